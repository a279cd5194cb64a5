// The tensors that layer norms save and return, on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "aten.h"
#include "check.h"

namespace cnnkern {

// mean and rstd have x's shape, with dimensions [first, last) of one element.
inline c10::SmallVector<int64_t, 6> statistics_shape(const Tensor& x, int64_t first, int64_t last) {
  c10::SmallVector<int64_t, 6> shape(x.sizes().begin(), x.sizes().end());
  std::fill(shape.begin() + first, shape.begin() + last, 1);
  return shape;
}

inline std::array<Tensor, 2> empty_statistics(const Tensor& x, int64_t first, int64_t last) {
  const auto shape = statistics_shape(x, first, last);
  const auto options = x.options().dtype(wide_type(x));
  return {aten::empty(shape, options), aten::empty(shape, options)};
}

// Like x, but in the dtype that y has.
inline Tensor empty_result(const Tensor& x, bool wide) {
  return aten::empty_strided(x.sizes(), x.strides(), x.options().dtype(wide ? wide_type(x) : x.scalar_type()));
}

// The gradients of a layer norm: defined if they are needed, otherwise returned empty. dbias is in the dtype of sums if the
// bias, which no gradient reads, is not given.
struct LayerNormGradients {
  Tensor dx, dweight, dbias;
  LayerNormGradients(const Tensor& x, at::IntArrayRef shape, const OptionalTensor& weight, const OptionalTensor& bias,
                     std::array<bool, 3> wanted) {
    if (wanted[0]) dx = aten::empty_like(x);
    if (wanted[1]) dweight = aten::empty(shape, weight->options());
    if (wanted[2]) {
      const Tensor& b = tensor_or_undefined(bias);
      dbias = aten::empty(shape, b.defined() ? b.options() : x.options().dtype(wide_type(x)));
    }
  }
  bool of_parameters() const { return dweight.defined() || dbias.defined(); }
  std::tuple<Tensor, Tensor, Tensor> zeros(const Tensor& x) const {
    for (const Tensor* t : {&dx, &dweight, &dbias})
      if (t->defined()) t->zero_();
    return tuple(x);
  }
  std::tuple<Tensor, Tensor, Tensor> tuple(const Tensor& x) const {
    const auto given = [&](const Tensor& t) { return t.defined() ? t : aten::empty({0}, x.options()); };
    return {given(dx), given(dweight), given(dbias)};
  }
};

}  // namespace cnnkern
