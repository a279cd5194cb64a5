#include "autograd/recompute.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include "autograd/below.h"
#include "autograd/strides.h"
#include "check.h"
#include "kernels.h"

namespace cnnkern {

namespace {

const void* our_pack = nullptr;

struct KnownResult {
  c10::weak_intrusive_ptr<c10::TensorImpl> result;
  RecipePointer recipe;
};
thread_local std::vector<KnownResult> known_results;

void forget_those_that_nobody_has() {
  std::erase_if(known_results, [](const KnownResult& known) { return known.result.expired(); });
}

// Of a tensor that is no view, unchanged or not.
RecipePointer recipe_of_result(const Tensor& y) {
  const auto node = y.grad_fn();
  if (auto* has = node ? dynamic_cast<HasRecipe*>(&*node) : nullptr) return has->recipe();
  forget_those_that_nobody_has();
  for (const auto& [result, recipe] : known_results)
    if (result._unsafe_get_target() == y.unsafeGetTensorImpl()) return recipe;
  return nullptr;
}

OptionalTensor copied(const Tensor& t) { return t.defined() ? OptionalTensor(copy_of(t)) : std::nullopt; }

}  // namespace

RecipePointer recipe_of(const Tensor& t, Depth depth) {
  if (!is_plain(t)) return nullptr;
  const Tensor base = t.is_view() ? Tensor(t._base()) : t;
  // Accessing its memory materialises a deferred result, whose node then has its recipe.
  if (!is_plain(base) || base.scalar_type() != t.scalar_type() || !base.has_storage()) return nullptr;
  RecipePointer recipe = recipe_of_result(base);
  if (!recipe || (depth == Depth::kWithinRecipe && !recipe->is_of_kept())) return nullptr;
  return recipe->gives(base) ? recipe : nullptr;
}

void hooks_are_ours_with(const void* pack) { our_pack = pack; }

SavedTensorHooks saved_tensor_hooks() {
  const auto& state = at::SavedTensorDefaultHooks::get_tls_state();
  if (state.stack.empty()) return SavedTensorHooks::kNone;
  if (state.is_tracing) return SavedTensorHooks::kOthers;
  const auto& pack = state.stack.top().first;
  const bool ours = state.stack.size() == 1 && pack.ptr(&pack.pyinterpreter()) == our_pack;
  return ours ? SavedTensorHooks::kOurs : SavedTensorHooks::kOthers;
}

bool may_recompute() {
  return saved_tensor_hooks() == SavedTensorHooks::kNone && at::SavedTensorDefaultHooks::is_enabled();
}

Tensor copy_of(const Tensor& t) {
  const Below below(/*inference=*/false);
  return t.clone();
}

Version::Version(const Tensor& t)
    : counter_(t.unsafeGetTensorImpl()->version_counter()), was_(counter_.current_version()) {}

void Version::check(at::ScalarType dtype, at::IntArrayRef sizes) const {
  TORCH_CHECK(is_current(), "one of the variables needed for gradient computation has been modified by an inplace operation: [", dtype,
              " ", sizes, "] is at version ", counter_.current_version(), "; expected version ", was_,
              " instead. (Saved within cnnkern.recompute, or to compute a result again.)");
}

Borrowed::Borrowed(const Tensor& t)
    : version_(t), memory_(t.storage().getWeakStorageImpl()), options_(t.options()), sizes_(t.sizes().vec()), strides_(t.strides().vec()),
      offset_(t.storage_offset()) {}

bool Borrowed::hold() {
  if (held_.defined()) return true;
  auto memory = memory_.lock();
  if (!memory || !version_.is_current()) return false;
  const auto key = options_.device().is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  held_ = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(memory)), c10::DispatchKeySet(key), options_.dtype());
  held_.unsafeGetTensorImpl()->set_sizes_and_strides(sizes_, strides_, offset_);
  return true;
}

Recipe::Recipe(Compute compute, bool of_kept, const Tensor& residual) : compute_(std::move(compute)), of_kept_(of_kept) {
  if (residual.defined()) residual_.emplace(residual);
}

void Recipe::is_for(const Tensor& y) {
  version_.emplace(y);
  memory_ = y.storage().getWeakStorageImpl();
  sizes_ = y.sizes().vec();
  strides_ = Strides(y.strides().begin(), y.strides().end());
  dtype_ = y.scalar_type();
  device_ = y.device();
}

bool Recipe::gives(const Tensor& t) {
  std::lock_guard<std::mutex> lock(mutex_);
  return version_->is_current() && memory_of(t) == memory_._unsafe_get_target() && t.sizes() == at::IntArrayRef(sizes_) &&
         t.strides() == at::IntArrayRef(strides_) && t.storage_offset() == 0 && t.scalar_type() == dtype_ &&
         (!residual_ || residual_->hold());
}

Tensor Recipe::computed() const {
  const Below below(/*inference=*/false);
  return restrided(compute_(residual_ ? residual_->tensor() : Tensor()), strides_);
}

Tensor Recipe::result() {
  // Other threads that need the result wait until it is computed. Threads that save it do not: they hold Python's lock, which a
  // kernel may need.
  std::lock_guard<std::mutex> computing(computing_);
  if (residual_) residual_->version().check(dtype_, sizes_);
  const int task = torch::autograd::get_current_graph_task_id();
  const c10::Stream present = stream_of(device_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (shared_.defined() && task == task_ && present == *stream_) {
      const Tensor found = shared_;
      if (++given_ >= savers_) forget();
      return found;
    }
  }
  const Tensor y = computed();
  std::lock_guard<std::mutex> lock(mutex_);
  if (task == -1 || savers_ == 1 || (shared_.defined() && task == task_)) return y;
  shared_ = y, given_ = 1, task_ = task, stream_ = present;
  torch::autograd::Engine::get_default_engine().queue_callback([weak = weak_from_this(), task] {
    if (const auto recipe = weak.lock()) {
      std::lock_guard<std::mutex> lock(recipe->mutex_);
      if (recipe->task_ == task) recipe->forget();
    }
  });
  return y;
}

void Recipe::saved_by(int change) {
  std::lock_guard<std::mutex> lock(mutex_);
  savers_ += change;
  if (change < 0 && given_ > 0) --given_;  // released when its gradient was computed
}

void Recipe::forget() {
  shared_ = Tensor();
  given_ = 0, task_ = -1;
}

RecipePointer recipe_of_batch_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
                                   const Tensor& mean, const Tensor& rstd, const std::string& act, std::optional<double> act_param) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::sync_bn", "").typed<signature::sync_bn>();
  const auto from = std::make_shared<Packed>(x, Depth::kWithinRecipe);
  const auto means = std::make_shared<Packed>(mean, Depth::kWithinRecipe), rstds = std::make_shared<Packed>(rstd, Depth::kWithinRecipe);
  // The forward pass of batch norms over processes: the same map, of given statistics.
  const auto compute = [from, means, rstds, w = copied(weight), b = copied(bias), act, act_param](const Tensor& added) {
    return std::get<0>(op.call(from->unpack(), optional_of(added), w, b, means->unpack(), rstds->unpack(), act, act_param));
  };
  return std::make_shared<Recipe>(compute, !from->is_recipe(), residual);
}

RecipePointer recipe_of_layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, LayerNormForward forward) {
  const auto from = std::make_shared<Packed>(x, Depth::kWithinRecipe);
  const auto compute = [from, w = copied(weight), b = copied(bias), forward](const Tensor&) { return forward(from->unpack(), w, b); };
  return std::make_shared<Recipe>(compute, !from->is_recipe());
}

torch::autograd::SavedVariable saved_with_recipe(const Tensor& t) {
  struct Hooks final : torch::autograd::SavedVariableHooks {
    Packed packed;
    explicit Hooks(const Tensor& t) : packed(t, Depth::kWithinRecipe) {}
    void call_pack_hook(const Tensor&) override {}  // gets an alias, of which there is no recipe
    Tensor call_unpack_hook() override { return packed.unpack(); }
  };
  const bool ours = saved_tensor_hooks() == SavedTensorHooks::kOurs;
  const NoHooks no_hooks;
  torch::autograd::SavedVariable saved(t, /*is_output=*/false);
  if (!ours || !t.defined() || !recipe_of(t, Depth::kWithinRecipe)) return saved;
  const c10::impl::ExcludeDispatchKeyGuard no_one_waits_for_it(kDeferredKey);  // nothing else uses the alias
  saved.register_hooks(std::make_unique<Hooks>(t));
  return saved;
}

void remember_recipe(const Tensor& y, RecipePointer recipe) {
  forget_those_that_nobody_has();
  recipe->is_for(y);
  known_results.push_back({c10::weak_intrusive_ptr<c10::TensorImpl>(y.getIntrusivePtr()), std::move(recipe)});
}

void forget_recipes() { known_results.clear(); }

Packed::Packed(const Tensor& t, Depth depth) : version_(t), recipe_(recipe_of(t, depth)) {
  if (recipe_) {
    sizes_ = t.sizes().vec(), strides_ = t.strides().vec(), offset_ = t.storage_offset();
    recipe_->saved_by(1);
  } else {
    kept_ = t.tensor_data();  // without its node, which may be the one that saves it
  }
}

Packed::~Packed() {
  if (recipe_) recipe_->saved_by(-1);
}

Tensor Packed::unpack() const {
  if (!recipe_) {
    if (!version_.is_current()) version_.check(kept_.scalar_type(), is_plain(kept_) ? kept_.sizes() : at::IntArrayRef());
    return kept_;
  }
  version_.check(recipe_->dtype(), sizes_);
  return computed();
}

Tensor Packed::computed() const {
  const Tensor y = recipe_->result();
  if (y.sizes() == at::IntArrayRef(sizes_) && y.strides() == at::IntArrayRef(strides_) && offset_ == 0) return y;
  const Below below(/*inference=*/false);
  return y.as_strided(sizes_, strides_, offset_);
}

}  // namespace cnnkern
