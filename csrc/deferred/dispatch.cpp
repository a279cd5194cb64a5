// What operators do with deferred results, and while some wait: the kernels of their dispatch key.
#include <ATen/RedispatchFunctions.h>
#include <torch/library.h>

#include <set>

#include "deferred/arguments.h"

namespace cnnkern {
namespace {

using Keys = c10::DispatchKeySet;

Keys below(Keys keys) { return keys & Keys(Keys::FULL_AFTER, kDeferredKey); }

// The rest of an operator, which need not come here again: its own calls see no more than it does.
template <typename Operator>
decltype(auto) past(const Operator& call) {
  c10::impl::ExcludeDispatchKeyGuard guard{Keys(kDeferredKey)};
  return call();
}

// Operators on images that give the same values whatever the strides of their inputs. They take what a folded convolution left
// with channels innermost as it is; of contiguous inputs the result is contiguous, when somebody asks.
bool takes_any_strides(const c10::OperatorHandle& op) {
  static const std::set<std::pair<std::string, std::string>> names = {
      {"aten::max_pool2d", ""}, {"aten::avg_pool2d", ""}, {"aten::adaptive_avg_pool2d", ""}, {"aten::cat", ""}, {"aten::mul", "Tensor"},
      {"aten::hardsigmoid", ""}, {"aten::upsample_nearest2d", "vec"}, {"aten::upsample_bilinear2d", "vec"}};
  const auto& name = op.schema().operator_name();
  return names.count({name.name, name.overload_name}) > 0;
}

// Replaces the stack by the result where the operator takes its inputs as they were computed.
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

void any_operator(const c10::OperatorHandle& op, Keys keys, torch::jit::Stack* stack) {
  if (compute_in_any_strides(op, stack)) return;
  {
    const auto& schema = op.schema();
    Arguments visited(schema.name());
    const bool is_collective = schema.name().rfind("c10d::", 0) == 0;  // whose schemas do not tell what they write to
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

template <typename Operator>
Tensor activate(const Tensor& t, const char* act, const Operator& otherwise) {
  if (Deferred* deferred = Deferred::of(t))
    if (auto result = deferred->activate(t, act, /*in_place=*/false)) return *result;
  Arguments(act).visit(t, /*writes=*/false);
  return past(otherwise);
}

template <typename Operator>
Tensor& activate_(Tensor& t, const char* act, const Operator& otherwise) {
  if (Deferred* deferred = Deferred::of(t))
    if (deferred->activate(t, act, /*in_place=*/true)) return t;
  Arguments(act).visit(t, /*writes=*/true);
  past(otherwise);
  return t;
}

#define CNNKERN_ACTIVATION(name)                                                                                     \
  Tensor name(Keys keys, const Tensor& t) {                                                                          \
    return activate(t, #name, [&] { return at::redispatch::name(below(keys), t); });                                 \
  }                                                                                                                  \
  Tensor& name##_(Keys keys, Tensor& t) {                                                                            \
    return activate_(t, #name, [&] { at::redispatch::name##_(below(keys), t); });                                    \
  }
CNNKERN_ACTIVATION(relu)
CNNKERN_ACTIVATION(relu6)
CNNKERN_ACTIVATION(sigmoid)
CNNKERN_ACTIVATION(silu)
CNNKERN_ACTIVATION(hardswish)
#undef CNNKERN_ACTIVATION

bool is(const at::Scalar& number, double value) { return !number.isComplex() && !number.isSymbolic() && number.toDouble() == value; }

Tensor hardtanh(Keys keys, const Tensor& t, const at::Scalar& low, const at::Scalar& high) {
  const auto otherwise = [&] { return at::redispatch::hardtanh(below(keys), t, low, high); };
  if (is(low, 0) && is(high, 6)) return activate(t, "relu6", otherwise);
  Arguments("hardtanh").visit(t, /*writes=*/false);
  return past(otherwise);
}
Tensor& hardtanh_(Keys keys, Tensor& t, const at::Scalar& low, const at::Scalar& high) {
  const auto otherwise = [&] { at::redispatch::hardtanh_(below(keys), t, low, high); };
  if (is(low, 0) && is(high, 6)) return activate_(t, "relu6", otherwise);
  Arguments("hardtanh").visit(t, /*writes=*/true);
  past(otherwise);
  return t;
}
Tensor leaky_relu(Keys keys, const Tensor& t, const at::Scalar& slope) {
  const auto otherwise = [&] { return at::redispatch::leaky_relu(below(keys), t, slope); };
  if (is(slope, 0.01)) return activate(t, "leaky_relu", otherwise);
  Arguments("leaky_relu").visit(t, /*writes=*/false);
  return past(otherwise);
}
Tensor& leaky_relu_(Keys keys, Tensor& t, const at::Scalar& slope) {
  const auto otherwise = [&] { at::redispatch::leaky_relu_(below(keys), t, slope); };
  if (is(slope, 0.01)) return activate_(t, "leaky_relu", otherwise);
  Arguments("leaky_relu").visit(t, /*writes=*/true);
  past(otherwise);
  return t;
}

Tensor add(Keys keys, const Tensor& a, const Tensor& b, const at::Scalar& alpha) {
  if (is(alpha, 1)) {
    for (const auto& [norm, residual, term] : {std::tuple(a, b, Deferred::kFirst), std::tuple(b, a, Deferred::kSecond)})
      if (Deferred* deferred = Deferred::of(norm))
        if (auto sum = deferred->add(norm, residual, term, /*in_place=*/false)) return *sum;
  }
  Arguments visited("add");
  visited.visit(a, /*writes=*/false), visited.visit(b, /*writes=*/false);
  return past([&] { return at::redispatch::add(below(keys), a, b, alpha); });
}
Tensor& add_(Keys keys, Tensor& a, const Tensor& b, const at::Scalar& alpha) {
  if (is(alpha, 1))
    if (Deferred* deferred = Deferred::of(a))
      if (deferred->add(a, b, Deferred::kFirst, /*in_place=*/true)) return a;
  Arguments visited("add");
  visited.visit(a, /*writes=*/true), visited.visit(b, /*writes=*/false);
  past([&] { at::redispatch::add_(below(keys), a, b, alpha); });
  return a;
}

// Makes an alias that autograd does not know of, through which NumPy writes unseen: Tensor.numpy() calls it.
Tensor detach(Keys keys, const Tensor& t) {
  Arguments visited("detach");
  visited.visit(t, /*writes=*/false);
  visited.expose(t);
  return past([&] { return at::redispatch::detach(below(keys), t); });
}

// What assigns to Tensor.data asks it first.
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
  m.impl("detach", &cnnkern::detach);
  m.impl("_has_compatible_shallow_copy_type", &cnnkern::has_compatible_shallow_copy_type);
  m.impl("add.Tensor", &cnnkern::add);
  m.impl("add_.Tensor", &cnnkern::add_);
}
