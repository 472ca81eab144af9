// `emovec._host`: what the host can tell about itself. Not on the path of any tensor, and optional at import.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "api.h"
#include "cpu/plan.h"

namespace {

const std::map<std::string, int32_t>& kernels() {
  static const std::map<std::string, int32_t> all = {
      {"cpu_scalar", EV_CPU_SCALAR},
      {"cpu_avx2", EV_CPU_AVX2},
      {"cpu_avx512", EV_CPU_AVX512},
      {"cpu_avx512_bf16", EV_CPU_AVX512_BF16},
      {"cpu_amx", EV_CPU_AMX},
#if defined(EMOVEC_CUDA)
      {"cuda_portable", EV_CUDA_PORTABLE},
      {"cuda_decode_sm90", EV_CUDA_DECODE_SM90},
      {"cuda_sliced", EV_CUDA_SLICED},
      {"cuda_decode_sm90_pdl", EV_CUDA_DECODE_SM90_PDL},
      {"cuda_stream_sm90", EV_CUDA_STREAM_SM90},
      {"cuda_stream_sm90_by_2", EV_CUDA_STREAM_SM90_BY_2},
      {"cuda_stream_sm90_by_4", EV_CUDA_STREAM_SM90_BY_4},
      {"cuda_stream_sm90_by_8", EV_CUDA_STREAM_SM90_BY_8},
#endif
  };
  return all;
}

std::string name_of(int32_t kernel) {
  for (const auto& [name, number] : kernels())
    if (number == kernel) return name;
  throw std::out_of_range("kernel " + std::to_string(kernel));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "emovec's host-side facts: kernels by name, and which of them this processor runs.";
  m.def("kernels", &kernels, "Number of every kernel in this build, by name, as `apply_(form=)` takes it.");
  m.def(
      "runs",
      [](const std::string& name) {
        const auto found = kernels().find(name);
        if (found == kernels().end()) throw pybind11::value_error("no kernel named '" + name + "'");
        return found->second < EV_CUDA_PORTABLE && ev_cpu_form_for(found->second) != nullptr;
      },
      pybind11::arg("name"), "Whether this processor can run the CPU kernel `name`.");
  m.def("fastest", [] { return name_of(ev_cpu_fastest()); }, "The CPU kernel that `apply_` takes here.");
  m.def(
      "plan",
      [](int64_t n, int64_t d, int64_t k, int64_t threads) {
        const ev_cpu_plan plan = ev_plan_cpu(n, d, (k + EV_LANES - 1) / EV_LANES * EV_LANES, threads, ev_cpu_form_for(ev_cpu_fastest())->tile);
        static const char* const splits[] = {"serial", "over concepts", "over tokens"};
        return std::make_pair(std::string(splits[plan.split]), plan.tile);
      },
      pybind11::arg("n"), pybind11::arg("d"), pybind11::arg("k"), pybind11::arg("threads"),
      "How a CPU call that reads N tokens of width d on K concepts is spread over threads: (split, tokens a tile).");
}
