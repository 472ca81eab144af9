// The op's schema, its argument checks and its dispatch. Only libtorch's stable ABI, so one binary serves every torch
// from 2.10 on, with or without CUDA. Everything is checked before anything is written.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <dlfcn.h>

#include <optional>
#include <string>
#include <vector>

#include "api.h"
#include "common/steer.h"
#include "schedule.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr char kSchema[] =
    "apply_(Tensor(a!) x, Tensor readers, Tensor directions, Tensor mean, Tensor inv_std, Tensor? residual=None, "
    "Tensor? row=None, Tensor? delta=None, Tensor? gate=None, Tensor? gate_threshold=None, Tensor? rule_concept=None, "
    "Tensor? rule_bounds=None, Tensor? rule_solve=None, Tensor(b!)? scores=None, Tensor(c!)? sqnorm=None, "
    "int form=0) -> ()";

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

ev_dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return EV_F32;
    case ScalarType::BFloat16: return EV_BF16;
    case ScalarType::Half: return EV_F16;
    default: STD_TORCH_CHECK(false, "emovec: x must be float32, bfloat16 or float16, got ", name_of(x.scalar_type()));
  }
  return EV_F32;
}

std::string text_of(std::initializer_list<int64_t> shape) {
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return text + "]";
}

// One tensor argument: its device, dtype and shape, each named in the error. Messages are made only where they are needed.
void check(const char* name, const Tensor& tensor, const Tensor& x, ScalarType dtype, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.device() == x.device(), "emovec: ", name, " is on another device than x");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "emovec: ", name, " must be ", name_of(dtype), ", got ", name_of(tensor.scalar_type()));
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) same = same && tensor.size(i++) == size;
  STD_TORCH_CHECK(same, "emovec: ", name, " must be ", text_of(shape), ", got ", shape_of(tensor));
}

void check_rows(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.size(1) <= 1 || tensor.stride(1) == 1, "emovec: the last dimension of ", name, " must be contiguous, its stride is ", tensor.stride(1));
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* contiguous(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "emovec: ", name, " must be contiguous");
  return data<T>(tensor);
}

// As emovec/ops.py packs them. Beside a 16-bit x they are rounded to its dtype, or not: then fp32 on a CPU, two parts on a GPU.
void set_readers(ev_args& a, const Tensor& x, const Tensor& readers) {
  const int64_t lanes = EV_LANES;
  const bool cpu = x.is_cpu();
  a.k_padded = (a.k + lanes - 1) / lanes * lanes;
  a.reader_parts = !cpu && a.dtype != EV_F32 && readers.dim() == 3 ? 2 : 1;
  a.reader_dtype = cpu && (a.dtype != EV_BF16 || readers.scalar_type() == ScalarType::Float) ? EV_F32 : a.dtype;
  if (a.reader_parts == 2) {
    check("readers", readers, x, x.scalar_type(), {2, a.k_padded, a.d});
  } else if (!cpu) {
    check("readers", readers, x, x.scalar_type(), {a.k_padded, a.d});
  } else if (a.reader_dtype == EV_BF16) {
    check("readers", readers, x, ScalarType::BFloat16, {a.k_padded / lanes, (a.d + 1) / 2, lanes, 2});
  } else {
    check("readers", readers, x, ScalarType::Float, {a.k_padded / lanes, a.d, lanes});
  }
  a.readers = contiguous<void>("readers", readers);
}

void set_table(ev_args& a, const Tensor& x, const Tensor& delta, const Optional& gate, const Optional& gate_threshold,
               const Optional& rule_concept, const Optional& rule_bounds, const Optional& rule_solve) {
  STD_TORCH_CHECK(gate && gate_threshold && rule_concept && rule_bounds && rule_solve, "emovec: the table's six tensors come together; some are missing");
  STD_TORCH_CHECK(delta.dim() == 2 && rule_concept->dim() == 2, "emovec: delta must be [R, d] and rule_concept [R, M], got ", shape_of(delta), " and ", shape_of(*rule_concept));
  ev_table& t = a.table;
  t.rows = delta.size(0);
  t.rules = rule_concept->size(1);
  STD_TORCH_CHECK(t.rules <= EV_MAX_RULES, "emovec: at most ", int(EV_MAX_RULES), " rules a row, got ", t.rules);
  check("delta", delta, x, ScalarType::Float, {t.rows, a.d});
  check("gate", *gate, x, ScalarType::Int, {t.rows, 2});
  check("gate_threshold", *gate_threshold, x, ScalarType::Float, {t.rows});
  check("rule_concept", *rule_concept, x, ScalarType::Int, {t.rows, t.rules});
  check("rule_bounds", *rule_bounds, x, ScalarType::Float, {t.rows, 3, t.rules});
  check("rule_solve", *rule_solve, x, ScalarType::Float, {t.rows, t.rules, t.rules});
  t.delta = contiguous<float>("delta", delta);
  t.gate = contiguous<int32_t>("gate", *gate);
  t.gate_threshold = contiguous<float>("gate_threshold", *gate_threshold);
  t.rule_concept = contiguous<int32_t>("rule_concept", *rule_concept);
  t.rule_bounds = contiguous<float>("rule_bounds", *rule_bounds);
  t.rule_solve = contiguous<float>("rule_solve", *rule_solve);
}

// On a CPU the indices themselves are checked too; on a GPU that would cost a synchronisation, and the kernels treat an
// index out of range as -1.
void check_indices(const ev_args& a) {
  const ev_table& t = a.table;
  for (int64_t j = 0; j < t.rows; ++j) {
    STD_TORCH_CHECK(t.gate[2 * j] >= -1 && t.gate[2 * j] < a.k, "emovec: gate of row ", j, " is on concept ", t.gate[2 * j], " of ", a.k);
    STD_TORCH_CHECK(t.gate[2 * j + 1] >= -1 && t.gate[2 * j + 1] < t.rows, "emovec: row ", j, " falls back to row ", t.gate[2 * j + 1], " of ", t.rows);
    for (int64_t m = 0; m < t.rules; ++m) {
      const int32_t concept = t.rule_concept[j * t.rules + m];
      STD_TORCH_CHECK(concept >= -1 && concept < a.k, "emovec: rule ", m, " of row ", j, " is on concept ", concept, " of ", a.k);
    }
  }
  if (!a.row) {
    STD_TORCH_CHECK(t.rows > 0 || a.n == 0, "emovec: without `row` every token uses row 0, but the table has no rows");
    return;
  }
  for (int64_t i = 0; i < a.n; ++i)
    STD_TORCH_CHECK(a.row[i] >= -1 && a.row[i] < t.rows, "emovec: row[", i, "] = ", a.row[i], " is not in a table of ", t.rows, " rows");
}

ev_args checked(const Tensor& x, const Tensor& readers, const Tensor& directions, const Tensor& mean, const Tensor& inv_std,
                const Optional& residual, const Optional& row, const Optional& delta, const Optional& gate,
                const Optional& gate_threshold, const Optional& rule_concept, const Optional& rule_bounds,
                const Optional& rule_solve, const Optional& scores, const Optional& sqnorm) {
  ev_args a{};
  STD_TORCH_CHECK(x.dim() == 2, "emovec: x must be [N, d], got ", shape_of(x));
  a.n = x.size(0);
  a.d = x.size(1);
  a.dtype = dtype_of(x);
  STD_TORCH_CHECK(directions.dim() == 2, "emovec: directions must be [K, d], got ", shape_of(directions));
  a.k = directions.size(0);
  STD_TORCH_CHECK(a.k >= 1 && a.k <= EV_MAX_CONCEPTS, "emovec: a layer holds 1 to ", int(EV_MAX_CONCEPTS), " concepts, got ", a.k);
  check_rows("x", x);
  check("directions", directions, x, x.scalar_type(), {a.k, a.d});
  check("mean", mean, x, ScalarType::Float, {a.k});
  check("inv_std", inv_std, x, ScalarType::Float, {a.k});
  set_readers(a, x, readers);
  a.x = x.data_ptr();
  a.x_stride = x.stride(0);
  a.directions = contiguous<void>("directions", directions);
  a.mean = contiguous<float>("mean", mean);
  a.inv_std = contiguous<float>("inv_std", inv_std);
  STD_TORCH_CHECK(a.n <= 1 || a.x_stride >= a.d, "emovec: the rows of x overlap, their stride is ", a.x_stride, " for d = ", a.d);
  if (residual) {
    check("residual", *residual, x, x.scalar_type(), {a.n, a.d});
    check_rows("residual", *residual);
    a.residual = residual->data_ptr();
    a.residual_stride = residual->stride(0);
  }
  if (scores) {
    const ScalarType type = scores->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "emovec: scores must be float32 or bfloat16, got ", name_of(type));
    check("scores", *scores, x, type, {a.n, a.k});
    check_rows("scores", *scores);
    a.scores = scores->data_ptr();
    a.scores_dtype = type == ScalarType::Float ? EV_F32 : EV_BF16;
    a.scores_stride = scores->stride(0);
  }
  if (sqnorm) {
    check("sqnorm", *sqnorm, x, ScalarType::Float, {a.n});
    a.sqnorm = contiguous<float>("sqnorm", *sqnorm);
  }
  STD_TORCH_CHECK(delta || !row, "emovec: `row` was given without a table");
  if (delta) set_table(a, x, *delta, gate, gate_threshold, rule_concept, rule_bounds, rule_solve);
  if (row) {
    check("row", *row, x, ScalarType::Int, {a.n});
    a.row = contiguous<int32_t>("row", *row);
  }
  return a;
}

int32_t kernel_of(int64_t form) {
  STD_TORCH_CHECK(form >= EV_AUTO && form <= EV_CUDA_DECODE_SM90_PDL, "emovec: there is no form ", form);
  return static_cast<int32_t>(form);
}

void apply_cpu(Tensor x, Tensor readers, Tensor directions, Tensor mean, Tensor inv_std, Optional residual, Optional row,
               Optional delta, Optional gate, Optional gate_threshold, Optional rule_concept, Optional rule_bounds,
               Optional rule_solve, Optional scores, Optional sqnorm, int64_t form) {
  const ev_args a = checked(x, readers, directions, mean, inv_std, residual, row, delta, gate, gate_threshold, rule_concept,
                            rule_bounds, rule_solve, scores, sqnorm);
  if (a.table.delta) check_indices(a);
  const ev_cpu_form* chosen = emovec::cpu_form(kernel_of(form));
  STD_TORCH_CHECK(chosen, "emovec: this processor cannot run form ", form);
  emovec::run(a, *chosen);
}

#if defined(EMOVEC_CUDA)
// The current stream is known to libtorch_cuda, which this library must not need, since it also loads where torch has
// none. Where a tensor is on a GPU torch has loaded it, though for itself only: so it is asked for by name.
using CurrentStream = int32_t (*)(int32_t device, void** stream);
CurrentStream current_stream() {
  static const CurrentStream found = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return torch_cuda ? reinterpret_cast<CurrentStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  return found;
}

void apply_cuda(Tensor x, Tensor readers, Tensor directions, Tensor mean, Tensor inv_std, Optional residual, Optional row,
                Optional delta, Optional gate, Optional gate_threshold, Optional rule_concept, Optional rule_bounds,
                Optional rule_solve, Optional scores, Optional sqnorm, int64_t form) {
  ev_args a = checked(x, readers, directions, mean, inv_std, residual, row, delta, gate, gate_threshold, rule_concept,
                      rule_bounds, rule_solve, scores, sqnorm);
  STD_TORCH_CHECK(a.d % 8 == 0, "emovec: on a GPU d must be a multiple of 8, got ", a.d);
  const int32_t kernel = kernel_of(form);
  STD_TORCH_CHECK(a.reader_parts == 1 || kernel <= EV_CUDA_PORTABLE || kernel == EV_CUDA_SLICED, "emovec: form ", form,
                  " takes readers that are rounded to the dtype of x, not those of precision=\"high\"; forms ", int(EV_CUDA_PORTABLE), " and ",
                  int(EV_CUDA_SLICED), " take both");
  STD_TORCH_CHECK(current_stream(), "emovec: x is on a GPU, but libtorch_cuda is not loaded or does not tell the current stream");
  const int32_t device = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(current_stream()(device, &stream) == 0, "emovec: torch does not tell the current stream of GPU ", device);
  ev_cuda_device gpu{};
  int error = ev_cuda_describe(&gpu);
  STD_TORCH_CHECK(error == 0, "emovec: the GPU does not describe itself: ", ev_cuda_error_string(error));
  const ev_cuda_plan plan = ev_plan_cuda(&a, kernel, &gpu);
  STD_TORCH_CHECK(plan.kernel != EV_NO_KERNEL, "emovec: this GPU cannot run form ", form, " on this call");
  std::optional<Tensor> workspace;  // torch's own, so that a captured call has one of its graph's
  if (plan.workspace > 0) {
    workspace = torch::stable::new_empty(x, {plan.workspace}, ScalarType::Float);
    a.workspace = data<float>(*workspace);
  }
  error = ev_cuda_apply(&a, &gpu, &plan, stream);
  STD_TORCH_CHECK(error == 0, "emovec: the CUDA kernel was not launched: ", ev_cuda_error_string(error));
}

// The plan of a call on a GPU that need not be here, as emovec/plan.py asks for it. Its tensors are aligned and without gaps.
// `parts`: of the readers. `rules`: of the table's rows, -1 without a table. `device` and what is returned: the fields of ev_cuda_device and ev_cuda_plan.
constexpr char kPlanSchema[] =
    "plan_cuda(int n, int d, int k, int dtype, int parts, bool residual, int rules, bool outputs, int[] device) -> int[]";
constexpr char kDescribeSchema[] = "describe_cuda() -> int[]";

std::vector<int64_t> plan_cuda(int64_t n, int64_t d, int64_t k, int64_t dtype, int64_t parts, bool residual, int64_t rules, bool outputs,
                               std::vector<int64_t> device) {
  STD_TORCH_CHECK(device.size() == 8, "emovec: a device is described by 8 numbers, got ", device.size());
  const auto of = [&](int i) { return static_cast<int32_t>(device[i]); };
  const ev_cuda_device on{of(0), of(1), of(2), of(3), {of(4), of(5), of(6), of(7)}};
  alignas(256) static float present[1];
  ev_args a{};
  a.n = n, a.d = a.x_stride = a.residual_stride = d, a.k = a.scores_stride = k;
  a.k_padded = (k + EV_LANES - 1) / EV_LANES * EV_LANES;
  a.dtype = a.reader_dtype = static_cast<ev_dtype>(dtype);
  a.reader_parts = static_cast<int32_t>(parts);
  a.x = present;
  a.readers = a.directions = present;
  if (residual) a.residual = present;
  if (outputs) a.scores = a.sqnorm = present;
  if (rules >= 0) a.table.delta = present, a.table.rules = rules;
  const ev_cuda_plan plan = ev_plan_cuda(&a, EV_AUTO, &on);
  return {plan.kernel, plan.tile, plan.blocks, plan.launches, plan.workspace, plan.passes, plan.again};
}

std::vector<int64_t> describe_cuda() {
  ev_cuda_device device{};
  const int error = ev_cuda_describe(&device);
  STD_TORCH_CHECK(error == 0, "emovec: the GPU does not describe itself: ", ev_cuda_error_string(error));
  std::vector<int64_t> all{device.multiprocessors, device.shared_bytes, device.capability, device.cluster};
  all.insert(all.end(), std::begin(device.stream_clusters), std::end(device.stream_clusters));
  return all;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(emovec, m) {
  m.def(kSchema);
#if defined(EMOVEC_CUDA)
  m.def(kPlanSchema);
  m.def(kDescribeSchema);
#endif
}
STABLE_TORCH_LIBRARY_IMPL(emovec, CPU, m) { m.impl("apply_", TORCH_BOX(&apply_cpu)); }
#if defined(EMOVEC_CUDA)
STABLE_TORCH_LIBRARY_IMPL(emovec, CUDA, m) { m.impl("apply_", TORCH_BOX(&apply_cuda)); }
STABLE_TORCH_LIBRARY_IMPL(emovec, CompositeExplicitAutograd, m) {
  m.impl("plan_cuda", TORCH_BOX(&plan_cuda));
  m.impl("describe_cuda", TORCH_BOX(&describe_cuda));
}
#endif
