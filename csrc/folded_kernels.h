// Convolutions of folded models in float32 on images with channels innermost, with what follows them: for each instruction set.
#pragma once

#include <ATen/core/Tensor.h>

#include "check.h"

namespace cnnkern {

struct Behind {
  const float* residual;  // laid out as the output; null for none
  ActivationName act;
};

struct ImageSizes {
  int64_t N, H, W, OH, OW, stride;
};

// A 1x1 convolution, a depthwise one and another 1x1 one, each with an activation: of MobileNets. The first or the last may be missing.
struct MobileBlock {
  ImageSizes image;  // of the depthwise convolution
  int64_t inputs, channels, outputs;  // of the block, between its convolutions, and of the last one
  const float* expand;  // packed, as the others; null: x has `channels` channels
  ActivationName expand_act;
  const float* depthwise;
  int64_t k, padding;
  ActivationName depthwise_act;
  const float* project;  // null: y has `channels` channels
  int64_t bands;  // of rows, into which each image is cut for the threads
};

// f(kernel) for each of them. The packed ones hold the bias too.
#define CNNKERN_FOLDED_KERNELS(f) f(pack_pointwise) f(pointwise) f(pack_depthwise) f(depthwise) f(scaled) f(mobile_block)

namespace folded_signature {

// weight (outputs, inputs, 1, 1), bias (outputs), which may be undefined.
using pack_pointwise = at::Tensor(const at::Tensor& weight, const at::Tensor& bias);
using pointwise = void(const float* x, const float* packed, float* y, int64_t inputs, int64_t outputs, int64_t pixels,
                       const Behind& behind);
// The same of x * scale, scale (images, inputs), with `pixels` per image.
using scaled = void(const float* x, const float* scale, const float* packed, float* y, int64_t inputs, int64_t outputs, int64_t images,
                    int64_t pixels, const Behind& behind);
// weight (channels, 1, k, k) with k 3 or 5, padding at most k - 1.
using pack_depthwise = at::Tensor(const at::Tensor& weight, const at::Tensor& bias);
using depthwise = void(const float* x, const float* packed, float* y, int64_t channels, int64_t k, int64_t padding,
                       const ImageSizes& sizes, const Behind& behind);

// What lies between the convolutions stays in a cache. `behind` is of the last one.
using mobile_block = void(const float* x, const MobileBlock& block, float* y, const Behind& behind);

}  // namespace folded_signature
}  // namespace cnnkern
