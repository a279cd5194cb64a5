// The schema of every operator. Kernels of the same name are registered by register_cpu.cpp,
// register_cuda.cpp and cnnkern/backends.py (Triton's), derivatives at the foot of csrc/autograd/<op>.cpp.
#include <torch/library.h>

TORCH_LIBRARY(cnnkern, m) {
  // Inductor may pass these operators tensors with other strides than it traced: their fakes follow the strides, as their kernels
  // do. The other operators have a mask, whose order is fixed in the trace.
  const std::vector<at::Tag> kAnyLayout{at::Tag::flexible_layout};

  // y = act(batch_norm(x)); act_param is the number of an activation that takes one, its default where None. mean and rstd are the fp64 vectors of C that the gradient needs. A gradient operator reads the
  // bias only for an activation (but none), here and below; without one dbias is float32, or float64 beside float64.
  m.def("bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, float eps, str act, float? act_param=None) -> (Tensor y, Tensor mean, Tensor rstd)", kAnyLayout);
  m.def("bn_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool training, str act, bool[3] output_mask, float? act_param=None) -> (Tensor dx, Tensor dweight, Tensor dbias)", kAnyLayout);

  // y = act(batch_norm(x) + residual). mask is [y > 0] for relu, one bit per element; else empty. channels_last says whether its
  // order is that of channels_last, or that of a contiguous tensor: of x as the forward pass saw it. For an activation that is
  // neither none nor relu the gradient operator reads the residual, and the bias as above.
  m.def("bn_add_act(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, float eps, str act, float? act_param=None) -> (Tensor y, Tensor mean, Tensor rstd, Tensor mask)");
  m.def("bn_add_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor mask, bool channels_last, bool training, str act, bool[4] output_mask, Tensor? residual=None, float? act_param=None) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");

  // y = prelu(batch_norm(x) + residual, slope); the residual is optional, and there is one slope, or one per channel. channels_last is
  // as above. dslope is the sum of dy * min(z, 0), z being what the activation saw.
  m.def("bn_prelu(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor slope, Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def("bn_prelu_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor slope, Tensor mean, Tensor rstd, bool channels_last, bool training, bool[5] output_mask) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dslope)");

  // Synchronised batch norm, in parts, with a collective between them for statistics or sums. moments are 2 C + 1 fp64 values
  // of x: every channel's mean and biased variance, then the elements per channel.
  m.def("sync_bn_stats(Tensor x) -> Tensor moments", kAnyLayout);
  // y = act(batch_norm(x) + residual) from given statistics, fp64 vectors of C. mask is [y > 0] where there are a residual
  // and a relu, one bit per element in the order of y's memory; else empty.
  m.def("sync_bn(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, str act, float? act_param=None) -> (Tensor y, Tensor mask)");
  // g is dy times act's derivative, or times the mask if it is given; act's argument includes the residual if that is given.
  // sums are the fp64 (2, C) sums of g and of g * (x - mean) * rstd.
  // channels_last is the order of the mask and of the results.
  m.def("sync_bn_sums(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor? mask, bool channels_last, str act, Tensor? residual=None, float? act_param=None) -> Tensor sums");
  // dx from the sums over all processes and their elements per channel, an fp64 tensor of one element; dresidual is g.
  m.def("sync_bn_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor? mask, bool channels_last, str act, Tensor sums, Tensor count, bool[2] output_mask, Tensor? residual=None, float? act_param=None) -> (Tensor dx, Tensor dresidual)");

  // y = relu(x + residual). mask is [y > 0], one bit per element in the order of y's memory; the gradient of both
  // inputs is dx. order has y's dimensions from the outermost to the innermost in memory.
  m.def("add_relu(Tensor x, Tensor residual) -> (Tensor y, Tensor mask)");
  m.def("add_relu_backward(Tensor dy, Tensor mask, int[] order) -> Tensor dx");

  // y = conv2d(x, weight, bias) of any number of groups, depthwise included; dx, dweight and dbias as asked for.
  m.def("grouped_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor y", kAnyLayout);
  m.def("grouped_conv2d_backward(Tensor dy, Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups, bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)", kAnyLayout);

  // y = layer norm of x over its last dimensions. mean and rstd have x's shape with one element there; their dtype is
  // float32, or float64 for float64 input. A wide y has that dtype too, as under autocast on a GPU, with parameters of that
  // dtype; otherwise y has x's dtype. dy has y's dtype.
  m.def("layer_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, bool wide=False) -> (Tensor y, Tensor mean, Tensor rstd)", kAnyLayout);
  m.def("layer_norm_backward(Tensor dy, Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)", kAnyLayout);

  // y = layer norm of x, (N, C, H, W), over C. mean and rstd: (N, 1, H, W), as above.
  m.def("layer_norm2d(Tensor x, Tensor? weight, Tensor? bias, float eps, bool wide=False) -> (Tensor y, Tensor mean, Tensor rstd)", kAnyLayout);
  m.def("layer_norm2d_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)", kAnyLayout);

  // y = max_pool2d(x), padded with -inf. positions are those of the maxima in their windows, counted row by row: one byte per
  // element of y, in y's shape. size is the height and width of x, channels_last the memory format of dx.
  m.def("max_pool2d(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode) -> (Tensor y, Tensor positions)", kAnyLayout);
  m.def("max_pool2d_backward(Tensor dy, Tensor positions, SymInt[] size, int[2] kernel_size, int[2] stride, int[2] padding, bool channels_last) -> Tensor dx", kAnyLayout);
}
