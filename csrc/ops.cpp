#include <torch/csrc/stable/library.h>
STABLE_TORCH_LIBRARY(emovec, m) {
  m.def(
      "apply_(Tensor(a!) x, Tensor readers, Tensor directions, Tensor mean, Tensor inv_std, Tensor? residual=None, "
      "Tensor? row=None, Tensor? delta=None, Tensor? gate=None, Tensor? gate_threshold=None, Tensor? rule_concept=None, "
      "Tensor? rule_bounds=None, Tensor? rule_solve=None, Tensor(b!)? scores=None, Tensor(c!)? sqnorm=None, int kernel=0) -> ()");
}
