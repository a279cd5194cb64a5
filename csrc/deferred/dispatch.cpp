// The kernels of the dispatch key of deferred results: called for every operator that gets one, or runs while one is deferred.
#include <ATen/RedispatchFunctions.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "autograd/composite.h"
#include "deferred/arguments.h"
#include "deferred/concatenation.h"
#include "deferred/folded.h"

namespace cnnkern {
namespace {

using Keys = c10::DispatchKeySet;

Keys below(Keys keys) { return keys & Keys(Keys::FULL_AFTER, kDeferredKey); }

// Calls the operator with this key excluded, so that the operators that it calls do not come here again.
template <typename Operator>
decltype(auto) past(const Operator& call) {
  c10::impl::ExcludeDispatchKeyGuard guard{Keys(kDeferredKey)};
  return call();
}

// Operators on images whose values do not depend on the strides of their inputs. They read a folded convolution's result in
// channels_last without a copy. If the original model's result would be contiguous, it is copied when it is used otherwise.
bool takes_any_strides(const c10::OperatorHandle& op) {
  static const std::set<std::pair<std::string, std::string>> names = {
      {"aten::max_pool2d", ""}, {"aten::avg_pool2d", ""}, {"aten::adaptive_avg_pool2d", ""}, {"aten::cat", ""}, {"aten::mul", "Tensor"},
      {"aten::upsample_nearest2d", "vec"}, {"aten::upsample_bilinear2d", "vec"}};
  const auto& name = op.schema().operator_name();
  return names.count({name.name, name.overload_name}) > 0;
}

// If the operator accepts its inputs in any strides, calls it, and replaces the stack by the result.
bool compute_in_any_strides(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  if (!takes_any_strides(op) || !is_undisturbed()) return false;
  const size_t count = op.schema().arguments().size(), first = stack->size() - count;
  bool found = false, contiguous = true;
  const auto look = [&](const Tensor& t) {
    if (!t.defined()) return;
    contiguous = contiguous && t.dim() == 4 && t.is_contiguous() && !(at::GradMode::is_enabled() && t.requires_grad()) && is_plain(t);
    const Deferred* deferred = Deferred::of(t);
    found = found || (deferred != nullptr && deferred->has_any_strides());
  };
  for (size_t i = first; i < stack->size(); ++i) {
    const c10::IValue& value = (*stack)[i];
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& t : value.toTensorVector()) look(t);
  }
  if (!found || !contiguous) return false;
  const std::string reason = op.schema().name() + " follows";
  const auto taken = [&](const Tensor& t) {
    Deferred* deferred = Deferred::of(t);
    const Tensor value = deferred == nullptr ? Tensor() : deferred->as_computed(reason);
    return value.defined() ? value : t;
  };
  for (size_t i = first; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor() && value.toTensor().defined()) {
      value = taken(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(taken(t));
      value = list;
    }
  }
  past([&] { op.callBoxed(stack); });
  const Tensor result = stack->back().toTensor();
  stack->back() = Deferred::laid(result, plain_strides(result.sizes(), /*rows=*/false));
  return true;
}

// Whether this is one of PyTorch's operators that only call others: they do whatever it does to tensors. By its schema it must not
// write to its arguments.
bool consists_of_others(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  return op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) && schema.name().rfind("aten::", 0) == 0 &&
         !schema.is_mutable();
}

bool has_deferred(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  return std::any_of(stack.end() - op.schema().arguments().size(), stack.end(), [](const c10::IValue& value) {
    return value.isTensor() && Deferred::of(value.toTensor()) != nullptr;
  });
}

void any_operator(const c10::OperatorHandle& op, Keys keys, torch::jit::Stack* stack) {
  if (compute_in_any_strides(op, stack)) return;
  // The operators that it calls come here instead. If it calls none, such as a dropout that drops nothing or `to` the same dtype,
  // it returns its input, which stays deferred.
  if (has_deferred(op, *stack) && consists_of_others(op) && is_undisturbed()) {
    const Called called(op.schema().name());
    op.redispatchBoxed(below(keys), stack);
    return;
  }
  {
    const auto& schema = op.schema();
    Arguments visited(schema.name());
    const bool is_collective = schema.name().rfind("c10d::", 0) == 0;  // whose schemas do not say what they write to
    const size_t first = stack->size() - schema.arguments().size();
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      const c10::IValue& value = (*stack)[first + i];
      const auto* alias = schema.arguments()[i].alias_info();
      const bool writes = is_collective || (alias != nullptr && alias->isWrite());
      visited.visit_all(value, writes);
    }
  }
  past([&] { op.redispatchBoxed(below(keys), stack); });
}

// By PyTorch's operator, with or without gradients.
void concatenate(const c10::OperatorHandle& op, Keys keys, torch::jit::Stack* stack) {
  const std::vector<Tensor> parts = (*stack)[stack->size() - 2].toTensorVector();
  const int64_t dim = stack->back().toInt();
  any_operator(op, keys, stack);
  remember_concatenation(stack->back().toTensor(), parts, dim);
}

// The product of an image and a deferred factor per channel is deferred too.
void multiply(const c10::OperatorHandle& op, Keys keys, torch::jit::Stack* stack) {
  const Tensor b = stack->back().toTensor(), a = (*stack)[stack->size() - 2].toTensor();
  for (const auto& [scale, image] : {std::pair(a, b), std::pair(b, a)})
    if (auto y = scaled(scale, image)) {
      torch::jit::drop(stack, 2);
      stack->emplace_back(*y);
      return;
    }
  any_operator(op, keys, stack);
}

// The result of an operator that cnnkern does not fuse, in place or out of place.
template <typename Operator>
Tensor as_it_is(const char* name, const Tensor& t, const Operator& otherwise) {
  Arguments(name).visit(t, /*writes=*/false);
  return past(otherwise);
}
template <typename Operator>
Tensor& as_it_is_(const char* name, Tensor& t, const Operator& otherwise) {
  Arguments(name).visit(t, /*writes=*/true);
  past(otherwise);
  return t;
}

// An activation, fused with the deferred result if cnnkern has it.
template <typename Operator>
Tensor activate(const char* name, const Tensor& t, const std::optional<Activation>& act, const Operator& otherwise) {
  if (Deferred* deferred = Deferred::of(t); deferred != nullptr && act)
    if (auto result = deferred->activate(t, *act, /*in_place=*/false)) return *result;
  return as_it_is(name, t, otherwise);
}
template <typename Operator>
Tensor& activate_(const char* name, Tensor& t, const std::optional<Activation>& act, const Operator& otherwise) {
  if (Deferred* deferred = Deferred::of(t); deferred != nullptr && act)
    if (deferred->activate(t, *act, /*in_place=*/true)) return t;
  return as_it_is_(name, t, otherwise);
}

#define CNNKERN_ACTIVATION(name)                                                                          \
  Tensor name(Keys keys, const Tensor& t) {                                                               \
    return activate(#name, t, Activation{#name}, [&] { return at::redispatch::name(below(keys), t); });   \
  }                                                                                                       \
  Tensor& name##_(Keys keys, Tensor& t) {                                                                 \
    return activate_(#name, t, Activation{#name}, [&] { at::redispatch::name##_(below(keys), t); });      \
  }
CNNKERN_ACTIVATION(relu)
CNNKERN_ACTIVATION(relu6)
CNNKERN_ACTIVATION(sigmoid)
CNNKERN_ACTIVATION(silu)
CNNKERN_ACTIVATION(hardswish)
CNNKERN_ACTIVATION(mish)
CNNKERN_ACTIVATION(hardsigmoid)
#undef CNNKERN_ACTIVATION

bool is(const at::Scalar& number, double value) { return !number.isComplex() && !number.isSymbolic() && number.toDouble() == value; }

std::optional<Activation> hardtanh_of(const at::Scalar& low, const at::Scalar& high) {
  return is(low, 0) && is(high, 6) ? std::optional(Activation{"relu6"}) : std::nullopt;
}
// An activation with a parameter. PyTorch refuses the gradient of in-place activations with a negative one.
std::optional<Activation> numbered(const char* name, const at::Scalar& number, bool in_place) {
  if (number.isComplex() || number.isSymbolic() || !std::isfinite(number.toDouble())) return std::nullopt;
  if (in_place && number.toDouble() < 0) return std::nullopt;
  return Activation{name, number.toDouble()};
}
std::optional<Activation> elu_of(const at::Scalar& alpha, const at::Scalar& scale, const at::Scalar& input_scale, bool in_place) {
  return is(scale, 1) && is(input_scale, 1) ? numbered("elu", alpha, in_place) : std::nullopt;
}
std::optional<Activation> gelu_of(c10::string_view approximate) {
  if (approximate == "none") return Activation{"gelu"};
  return approximate == "tanh" ? std::optional(Activation{"gelu_tanh"}) : std::nullopt;
}

Tensor hardtanh(Keys keys, const Tensor& t, const at::Scalar& low, const at::Scalar& high) {
  return activate("hardtanh", t, hardtanh_of(low, high), [&] { return at::redispatch::hardtanh(below(keys), t, low, high); });
}
Tensor& hardtanh_(Keys keys, Tensor& t, const at::Scalar& low, const at::Scalar& high) {
  return activate_("hardtanh", t, hardtanh_of(low, high), [&] { at::redispatch::hardtanh_(below(keys), t, low, high); });
}
Tensor leaky_relu(Keys keys, const Tensor& t, const at::Scalar& slope) {
  return activate("leaky_relu", t, numbered("leaky_relu", slope, /*in_place=*/false),
                  [&] { return at::redispatch::leaky_relu(below(keys), t, slope); });
}
Tensor& leaky_relu_(Keys keys, Tensor& t, const at::Scalar& slope) {
  return activate_("leaky_relu", t, numbered("leaky_relu", slope, /*in_place=*/true),
                   [&] { at::redispatch::leaky_relu_(below(keys), t, slope); });
}
Tensor elu(Keys keys, const Tensor& t, const at::Scalar& alpha, const at::Scalar& scale, const at::Scalar& input_scale) {
  return activate("elu", t, elu_of(alpha, scale, input_scale, /*in_place=*/false),
                  [&] { return at::redispatch::elu(below(keys), t, alpha, scale, input_scale); });
}
Tensor& elu_(Keys keys, Tensor& t, const at::Scalar& alpha, const at::Scalar& scale, const at::Scalar& input_scale) {
  return activate_("elu", t, elu_of(alpha, scale, input_scale, /*in_place=*/true),
                   [&] { at::redispatch::elu_(below(keys), t, alpha, scale, input_scale); });
}
Tensor gelu(Keys keys, const Tensor& t, c10::string_view approximate) {
  return activate("gelu", t, gelu_of(approximate), [&] { return at::redispatch::gelu(below(keys), t, approximate); });
}
Tensor& gelu_(Keys keys, Tensor& t, c10::string_view approximate) {
  return activate_("gelu", t, gelu_of(approximate), [&] { at::redispatch::gelu_(below(keys), t, approximate); });
}

// PReLU with this slope, if cnnkern's kernels compute it. They do not if PyTorch would refuse the slope, or if autocast would change
// the result's dtype.
std::optional<Activation> prelu_of(const Tensor& t, const Tensor& slope) {
  if (!is_plain(slope) || slope.device() != t.device() || has_tangent(slope)) return std::nullopt;
  if (slope.is_inference() && !c10::InferenceMode::is_enabled()) return std::nullopt;
  if (slope.dim() > 1 || (slope.numel() != 1 && slope.numel() != t.size(1))) return std::nullopt;
  const auto device = t.device().type();
  const bool casts = at::autocast::is_autocast_enabled(device) && t.scalar_type() != at::kDouble;
  if (casts && t.scalar_type() != at::autocast::get_autocast_dtype(device)) return std::nullopt;
  if (slope.scalar_type() != t.scalar_type() && !(casts && slope.scalar_type() == at::kFloat)) return std::nullopt;
  // PyTorch's node saves a view of it too, so an assignment to the slope's .data does not change the saved values.
  return Activation{"prelu", std::nullopt, past([&] { return slope.view(slope.sizes()); })};
}
Tensor prelu(Keys keys, const Tensor& t, const Tensor& slope) {
  const auto act = Deferred::of(t) == nullptr ? std::nullopt : prelu_of(t, slope);
  if (act)
    if (auto result = Deferred::of(t)->activate(t, *act, /*in_place=*/false)) return *result;
  Arguments visited("prelu");
  visited.visit(t, /*writes=*/false), visited.visit(slope, /*writes=*/false);
  return past([&] { return at::redispatch::prelu(below(keys), t, slope); });
}

// Whether this is the Python number 0, as a tensor without dimensions. It is read without an operator, which a mode would see.
bool is_zero(const Tensor& t) {
  if (!t.defined() || !t.unsafeGetTensorImpl()->is_wrapped_number() || !is_plain(t) || !t.is_cpu()) return false;
  return (t.scalar_type() == at::kLong && *t.const_data_ptr<int64_t>() == 0) ||
         (t.scalar_type() == at::kDouble && *t.const_data_ptr<double>() == 0);
}

std::optional<Tensor> sum_of(Deferred& norm, const Tensor& self, const Tensor& other, Deferred::Term term, bool in_place) {
  return is_zero(other) ? norm.add_zero(self, in_place) : norm.add(self, other, term, in_place);
}

Tensor add(Keys keys, const Tensor& a, const Tensor& b, const at::Scalar& alpha) {
  if (is(alpha, 1)) {
    for (const auto& [norm, residual, term] : {std::tuple(a, b, Deferred::kFirst), std::tuple(b, a, Deferred::kSecond)})
      if (Deferred* deferred = Deferred::of(norm))
        if (auto sum = sum_of(*deferred, norm, residual, term, /*in_place=*/false)) return *sum;
  }
  Arguments visited("add");
  visited.visit(a, /*writes=*/false), visited.visit(b, /*writes=*/false);
  return past([&] { return at::redispatch::add(below(keys), a, b, alpha); });
}
Tensor& add_(Keys keys, Tensor& a, const Tensor& b, const at::Scalar& alpha) {
  Deferred* const norm = is(alpha, 1) ? Deferred::of(b) : nullptr;
  if (is(alpha, 1))
    if (Deferred* deferred = Deferred::of(a))
      if (sum_of(*deferred, a, b, Deferred::kFirst, /*in_place=*/true)) return a;
  if (norm != nullptr && norm->add_onto(b, a)) return a;
  Arguments visited("add");
  visited.visit(a, /*writes=*/true);
  if (norm != nullptr && norm->add_into(b, a)) return a;
  visited.visit(b, /*writes=*/false);
  past([&] { at::redispatch::add_(below(keys), a, b, alpha); });
  return a;
}

// detach makes an alias that autograd does not track. Tensor.numpy() calls it, and NumPy's writes are not seen.
Tensor detach(Keys keys, const Tensor& t) {
  Arguments visited("detach");
  visited.visit(t, /*writes=*/false);
  visited.expose(t);
  return past([&] { return at::redispatch::detach(below(keys), t); });
}

// Called before an assignment to Tensor.data.
bool has_compatible_shallow_copy_type(Keys keys, const Tensor& t, const Tensor& from) {
  Arguments visited("an assignment to data");
  visited.visit(from, /*writes=*/false);
  visited.expose(t);
  return past([&] { return at::redispatch::_has_compatible_shallow_copy_type(below(keys), t, from); });
}

}  // namespace

}  // namespace cnnkern

TORCH_LIBRARY_IMPL(_, DeferredInit, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&cnnkern::any_operator>()); }

TORCH_LIBRARY_IMPL(aten, DeferredInit, m) {
  for (const char* name : {"cat", "concat", "concatenate"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&cnnkern::concatenate>());
  m.impl("mul.Tensor", torch::CppFunction::makeFromBoxedFunction<&cnnkern::multiply>());
  m.impl("relu", &cnnkern::relu);
  m.impl("relu_", &cnnkern::relu_);
  m.impl("relu6", &cnnkern::relu6);
  m.impl("relu6_", &cnnkern::relu6_);
  m.impl("hardtanh", &cnnkern::hardtanh);
  m.impl("hardtanh_", &cnnkern::hardtanh_);
  m.impl("leaky_relu", &cnnkern::leaky_relu);
  m.impl("leaky_relu_", &cnnkern::leaky_relu_);
  m.impl("sigmoid", &cnnkern::sigmoid);
  m.impl("sigmoid_", &cnnkern::sigmoid_);
  m.impl("silu", &cnnkern::silu);
  m.impl("silu_", &cnnkern::silu_);
  m.impl("hardswish", &cnnkern::hardswish);
  m.impl("hardswish_", &cnnkern::hardswish_);
  m.impl("mish", &cnnkern::mish);
  m.impl("mish_", &cnnkern::mish_);
  m.impl("hardsigmoid", &cnnkern::hardsigmoid);
  m.impl("hardsigmoid_", &cnnkern::hardsigmoid_);
  m.impl("elu", &cnnkern::elu);
  m.impl("elu_", &cnnkern::elu_);
  m.impl("gelu", &cnnkern::gelu);
  m.impl("gelu_", &cnnkern::gelu_);
  m.impl("prelu", &cnnkern::prelu);
  m.impl("detach", &cnnkern::detach);
  m.impl("_has_compatible_shallow_copy_type", &cnnkern::has_compatible_shallow_copy_type);
  m.impl("add.Tensor", &cnnkern::add);
  m.impl("add_.Tensor", &cnnkern::add_);
}
