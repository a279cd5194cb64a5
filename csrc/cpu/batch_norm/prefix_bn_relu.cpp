// prefix_bn_relu: batch norm in training, then ReLU, of the first channels of a wider tensor whose statistics are known: of the
// buffer of a dense block (autograd/dense_block.h).
//   y = relu(pre), pre = (x - mean) * weight * rstd + bias
// Backward adds, with g = dy * [y > 0] and n elements per channel:
//   dx += weight * rstd * (g - sum(g) / n - (x - mean) * rstd * sum(g * (x - mean) * rstd) / n)
// x and dx are prefixes, y and dy are dense. The passes are those of bn_act, with pointers that are moved by image (planes) or by
// row. Memory traffic, in tensors read or written: 2 forward; 4 backward while a channel (planes) or the tensor (rows) stays in
// cache, rows beyond the last-level cache 6. Accumulators: the arithmetic type for 64 additions, then double (see passes.h).
#include <array>

#include "cpu/batch_norm/batch_norm.h"
#include "kernels.h"
#include "prefix.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace {

// A part of x or dx that is dense: an image of planes, or a row. The passes count elements as in a dense tensor, y or dy; in a
// prefix each part begins `gap` elements later than the one before would end.
struct Part {
  int64_t index, gap_after, end;  // from `end` on, what is fetched ahead lies `gap_after` later
  int64_t fetched(int64_t i) const { return i < end ? i : i + gap_after; }
};

template <typename T>
struct Forward : BatchNormForward<T> {
  using Base = BatchNormForward<T>;
  using V = Vec<T>;
  static constexpr bool kReduces = false;

  const double *given_mean, *given_var;
  int64_t gap;

  static constexpr bool reduces() { return false; }
  void prepare(int64_t c, int64_t n) {
    Lot m{}, var{};
    std::copy_n(given_mean + c, n, m.data()), std::copy_n(given_var + c, n, var.data());
    this->set_affine(c, n, m, var);
    this->running.update(c, n, m, var, this->view.count());
  }

  struct OfPart {
    using Scalar = T;
    static constexpr int kRows = Base::kRows;
    const Forward& all;
    const ChannelTable<T, kRows>& table;
    const T* x;
    Part part;

    T* output() const { return all.y; }
    void prefetch(int64_t i) const { __builtin_prefetch(x + part.fetched(i), 0, 2); }
    template <typename At>
    void map(const At& at, int64_t i, bool stream) const {
      vput(all.y + i, Relu::value<T>(all.normalized(at, vload(x + i))), stream);
    }
    template <typename At>
    void map_part(const At& at, int64_t i, int64_t n) const {
      vstore(all.y + i, Relu::value<T>(all.normalized(at, vload(x + i, n, V(0)))), n);
    }
  };
  OfPart of(const Part& part) const { return {*this, this->table, this->x + part.index * gap, part}; }
  int64_t widest_gap() const { return gap; }
};

template <typename T>
struct Backward : BatchNormBackward<T, ThroughActivation<T, Relu>> {
  using Base = BatchNormBackward<T, ThroughActivation<T, Relu>>;
  using V = Vec<T>;
  static constexpr bool kReduces = true;

  int64_t x_gap, dx_gap;

  struct OfPart {
    using Scalar = T;
    static constexpr int kRows = Base::kRows, kSums = Base::kSums;
    const Backward& all;
    const ChannelTable<T, kRows>& table;
    const T* x;
    T* dx;
    Part part;

    T* output() const { return dx; }
    void prefetch(int64_t i) const {
      __builtin_prefetch(x + part.fetched(i), 0, 2), __builtin_prefetch(all.dy + i, 0, 2);
    }
    template <bool kPartial, typename At>
    void term(const At& at, int64_t i, int64_t n, VectorSums<V, kSums>& sums) const {
      V centered;
      const V g = all.template gradient<kPartial>(at, x, i, n, centered);
      sums[0] = sums[0] + g;
      sums[1] = at::vec::fmadd(g, centered, sums[1]);
    }
    template <typename At>
    void map(const At& at, int64_t i, bool) const {  // never past the caches, as dx is read too
      V centered;
      const V g = all.template gradient<false>(at, x, i, 0, centered);
      vstore(dx + i, vload(dx + i) + all.result(at, g, centered));
    }
    template <typename At>
    void map_part(const At& at, int64_t i, int64_t n) const {
      V centered;
      const V g = all.template gradient<true>(at, x, i, n, centered);
      vstore(dx + i, vload(dx + i, n, V(0)) + all.result(at, g, centered), n);
    }
  };
  OfPart of(const Part& part) const {
    return {*this, this->table, this->x + part.index * x_gap, this->dx + part.index * dx_gap, part};
  }
  int64_t widest_gap() const { return x_gap; }
};

template <typename Policy>
struct PlanesOfPrefix final : PassesOf<Policy, PlanePasses<compute_t<typename Policy::Scalar>, Policy::Reduction::kSums>> {
  using S = compute_t<typename Policy::Scalar>;
  static constexpr int kSums = Policy::Reduction::kSums;
  using PassesOf<Policy, PlanePasses<S, kSums>>::PassesOf;

  auto image(int64_t n) const { return this->policy.of({n, this->policy.widest_gap(), (n + 1) * size()}); }
  int64_t size() const { return this->s.C * this->s.HW; }

  void add(PieceSums<S, kSums>& piece, int64_t n, int64_t part, int64_t ahead) const override {
    if constexpr (Policy::kReduces) piece.add(image(n), n, part, ahead);
  }
  void map(int64_t begin, int64_t end, int64_t ahead, bool stream) const override {
    for (int64_t n = begin / size(); begin < end; ++n) {
      const int64_t stop = std::min(end, (n + 1) * size());
      map_span(image(n), this->s, begin, stop, ahead, stream);
      begin = stop;
    }
  }
};

template <typename Policy>
struct RowsOfPrefix final : PassesOf<Policy, RowPasses<compute_t<typename Policy::Scalar>, Policy::Reduction::kSums>> {
  using T = typename Policy::Scalar;
  using S = compute_t<T>;
  using V = Vec<T>;
  static constexpr int kSums = Policy::Reduction::kSums;
  static constexpr int64_t L = V::size(), kFetched = kAhead / static_cast<int64_t>(sizeof(T));
  using PassesOf<Policy, RowPasses<S, kSums>>::PassesOf;

  // Rows are not joined to wider ones, as gaps are between them: of a table that is wider only the first C columns are used.
  void resize(int64_t width) override { this->policy.table.resize(this->s.C, width); }
  void replicate() override { this->policy.table.replicate(); }
  // How much later than in a dense tensor what is fetched ahead lies.
  int64_t gap_to_fetched() const { return kFetched / this->s.C * this->policy.widest_gap(); }

  void reduce(int64_t width, int64_t begin, int64_t end, bool fetch, double* sums, S* acc) const override {
    const int64_t C = this->s.C, last = end / C, gap = gap_to_fetched();
    const auto flush = [&] {
      for (int64_t j = 0; j < kSums * width; ++j) sums[j] += acc[j];
      std::fill_n(acc, kSums * width, S(0));
    };
    std::fill_n(acc, kSums * width, S(0));
    int64_t r = begin / C, pending = 0;
    const auto together = [&](auto rows) {  // several are summed in registers first
      for (; r + rows <= last; r += rows) {
        add<decltype(rows)::value>(width, r, gap, fetch, acc);
        if ((pending += rows) >= 4 * kFlush) flush(), pending = 0;
      }
    };
    together(std::integral_constant<int, 4>{});
    together(std::integral_constant<int, 1>{});
    flush();
  }
  void map(int64_t, int64_t begin, int64_t end, bool fetch, bool stream) const override {
    const int64_t C = this->s.C, gap = gap_to_fetched();
    for (int64_t r = begin / C, i = begin; i < end; ++r, i += C)
      map_rows(this->policy.of({r, gap, 0}), C, i, i + C, fetch, stream && C % L == 0);
  }

 private:
  template <int kTogether>
  void add(int64_t width, int64_t first, int64_t gap, bool fetch, S* acc) const {
    if constexpr (Policy::kReduces) {
      using Of = typename Policy::OfPart;
      const int64_t C = this->s.C;
      const auto columns = [&](auto partial, int64_t v, int64_t n) {
        constexpr bool kPartial = decltype(partial)::value;
        const auto at = kPartial ? Constants<Policy>::columns(this->policy, v, n) : Constants<Policy>::columns(this->policy, v);
        auto found = VectorSums<V, kSums>::zero();
        for (int64_t r = first; r < first + kTogether; ++r) {
          const Of of = this->policy.of({r, gap, 0});
          if (fetch) of.prefetch(r * C + v + kFetched);
          of.template term<kPartial>(at, r * C + v, n, found);
        }
        each<kSums>([&](auto k) {
          S* const to = acc + k * width + v;
          kPartial ? vstore<S>(to, vload<S>(to, n, V(0)) + found[k], n) : vstore<S>(to, vload<S>(to) + found[k]);
        });
      };
      int64_t v = 0;
      for (; v + L <= C; v += L) columns(std::false_type{}, v, L);
      if (v < C) columns(std::true_type{}, v, C - v);
    }
  }
};

template <typename Policy>
void run_prefix(Policy policy, const Layout& layout) {
  if (layout.rows) {
    RowsOfPrefix<Policy> passes(policy);
    passes.s = layout.as_rows();
    pass_over_rows(passes);
  } else {
    policy.table.resize(layout.C, layout.C);
    PlanesOfPrefix<Policy> passes(policy);
    passes.s = layout.as_planes();
    pass_over_planes(passes);
  }
}

Layout layout_of_prefix(const Tensor& x, bool rows) {
  const int64_t HW = x.size(2) * x.size(3);
  return {rows || HW == 1, x.size(0), x.size(1), HW};
}

// How many elements lie between two parts of t.
int64_t gap_of(const char* op, const Tensor& t, bool rows, const Layout& layout) {
  const int64_t width = width_of_prefix(t, rows);
  TORCH_CHECK(width > 0, op, ": expected the first channels of a wider tensor that is ", rows ? "channels_last" : "contiguous",
              "; got strides ", t.strides(), " of shape ", t.sizes());
  return (width - layout.C) * (layout.rows ? 1 : layout.HW);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> prefix_bn_relu_cpu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                                      const Tensor& mean, const Tensor& var, double momentum, double eps, bool rows) {
  const char* op = "cnnkern::prefix_bn_relu";
  const Layout layout = layout_of_prefix(x, rows);
  const int64_t gap = gap_of(op, x, rows, layout);
  const Strides dense = plain_strides(x.sizes(), rows);
  Tensor y = aten::empty_strided(x.sizes(), elementwise_strides(x.sizes(), dense, dense), x.options());
  Tensor own_mean = aten::empty({layout.C}, mean.options()), rstd = aten::empty_like(own_mean);
  with_type(x, [&](auto scalar) {
    using T = decltype(scalar);
    run_prefix(Forward<T>{batch_norm_forward<T>(x, layout, weight, bias, running_mean, running_var, /*training=*/true, momentum, eps, y,
                                                own_mean, rstd),
                          mean.const_data_ptr<double>(), var.const_data_ptr<double>(), gap},
               layout);
  });
  return {y, own_mean, rstd};
}

std::tuple<Tensor, Tensor> prefix_bn_relu_backward_cpu(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                       const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                                       const Tensor& dx, bool rows, std::array<bool, 2> output_mask) {
  const char* op = "cnnkern::prefix_bn_relu_backward";
  const Layout layout = layout_of_prefix(x, rows);
  const int64_t x_gap = gap_of(op, x, rows, layout), dx_gap = gap_of(op, dx, rows, layout);
  const Tensor dy_ = laid_out(dy, rows);
  Tensor dweight = parameter_gradient(output_mask[0], weight, x), dbias = parameter_gradient(output_mask[1], bias, x);
  with_type(x, [&](auto scalar) {
    using T = decltype(scalar);
    run_prefix(Backward<T>{batch_norm_backward<T>(dy_, x, layout, weight, bias, mean, rstd, /*training=*/true,
                                                  {.dx = dx, .dweight = dweight, .dbias = dbias}, ThroughActivation<T, Relu>{}),
                           x_gap, dx_gap},
               layout);
  });
  return {dweight, dbias};
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
