// The table of contents: the schema of every operator. Each backend registers its kernels under the same
// name at the foot of its own file (csrc/cpu, csrc/cuda, triton_kernels), autograd in csrc/autograd.
#include <torch/library.h>

TORCH_LIBRARY(cnnkern, m) {
  // y = act(batch_norm(x)). mean and rstd are the fp64 vectors of C that the gradient needs.
  m.def("bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, float eps, str act) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def("bn_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool training, str act, bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}
