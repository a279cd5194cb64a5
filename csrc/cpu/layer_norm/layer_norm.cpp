// layer_norm, over rows of n elements: y = xhat * weight + bias, xhat = (x - mean) * rstd.
// Backward, with g = dy * weight: dbias = sum of dy over rows, dweight = sum of dy * xhat over rows,
//   dx = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n).
// Four rows are computed together, so that their sums do not wait for one another, and weight, bias and the sums over
// rows are read once for four. Sums are taken of x, then of x - mean, while the rows are in cache; in the
// arithmetic type for at most kRun additions per lane, then in double.
// Memory traffic, in tensors read or written, while four rows stay in cache: 2 forward, 3 backward. A thread owns rows; dweight
// and dbias are summed over pieces of rows that depend only on the shape, and those added in their order. Where rows
// are few and long, threads own columns for what follows the sums.
#include "cpu/layer_norm/layer_norm.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/macros/Macros.h>

#include "aten.h"
#include "memory_layout.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int kGroup = 4;                // rows computed together
constexpr int64_t kFewRows = 64;         // so few that pieces of them would not keep threads busy ...
constexpr int64_t kLongRow = 1024;       // ... and so long that parts of them do
constexpr int64_t kColumns = 512;        // of such a part
constexpr int64_t kLeastGroups = 4;      // of a piece

// How far ahead of a row the row to be prefetched is: whole groups, so that page boundaries do not matter.
template <typename T>
int64_t rows_ahead(int64_t cols) {
  return divup(kAhead / static_cast<int64_t>(sizeof(T)), kGroup * cols) * kGroup * cols;
}

// totals[k][r] = sum over columns [0, cols) of what term(r, j, n, partial, sums) adds to sums[k] for columns j .. j + n
// of row r. A single row has several sums, for alternating vectors, so that one addition does not wait for another.
template <typename T, int kSums, int kRows, typename Term>
inline void sum_columns(int64_t cols, double* const (&totals)[kSums], const Term& term) {
  using V = Vec<T>;
  constexpr int64_t L = V::size();
  constexpr int kTurns = kGroup / kRows;
  for (int64_t begin = 0; begin < cols; begin += kRun * kTurns * L) {
    const int64_t end = std::min(cols, begin + kRun * kTurns * L);
    V sums[kTurns][kRows][kSums];
    for (auto& turn : sums)
      for (auto& row : turn)
        for (V& v : row) v = V(0);
    int64_t j = begin;
    for (; j + kTurns * L <= end; j += kTurns * L)
      for (int t = 0; t < kTurns; ++t)
        for (int r = 0; r < kRows; ++r) term(r, j + t * L, L, std::false_type{}, sums[t][r]);
    for (; j + L <= end; j += L)
      for (int r = 0; r < kRows; ++r) term(r, j, L, std::false_type{}, sums[0][r]);
    if (j < end)
      for (int r = 0; r < kRows; ++r) term(r, j, end - j, std::true_type{}, sums[0][r]);
    for (int k = 0; k < kSums; ++k) {
      V all[kGroup];
      double found[kGroup];
      for (int t = 0; t < kTurns; ++t)
        for (int r = 0; r < kRows; ++r) all[t * kRows + r] = sums[t][r][k];
      sum_lanes(all, found);
      for (int i = 0; i < kGroup; ++i) totals[k][i % kRows] = (begin + i < kRows ? 0.0 : totals[k][i % kRows]) + found[i];
    }
  }
}

template <bool kPartial, typename T>
inline Vec<T> load(const T* p, int64_t n, Vec<T> rest) {
  return kPartial ? vload(p, n, rest) : vload(p);
}

template <typename T>
struct Forward {
  using S = compute_t<T>;
  using V = Vec<T>;
  const T* x;
  T* y;
  S *mean, *rstd;
  const S *weight, *bias;
  int64_t cols;
  double eps;
  bool stream;

  template <int kRows>
  C10_NOINLINE void group(int64_t row) const {
    const T* const in = x + row * cols;
    Moments<S, 8> m;
    std::fill_n(m.sum, 8, 0.0), std::fill_n(m.squares, 8, 0.0);
    sum_columns<T, 1, kRows>(cols, {m.sum}, [&](int r, int64_t j, int64_t n, auto partial, auto& sums) {
      sums[0] = sums[0] + load<decltype(partial)::value>(in + r * cols + j, n, V(0));
    });
    m.set_center(static_cast<double>(cols));
    V center[kRows], scale[kRows], offset[kRows];
    for (int r = 0; r < kRows; ++r) center[r] = V(m.center[r]);
    sum_columns<T, 2, kRows>(cols, {m.sum, m.squares}, [&](int r, int64_t j, int64_t n, auto partial, auto& sums) {
      const V d = load<decltype(partial)::value>(in + r * cols + j, n, center[r]) - center[r];
      sums[0] = sums[0] + d;
      sums[1] = at::vec::fmadd(d, d, sums[1]);
    });
    if (!m.finish(static_cast<double>(cols), eps))
      for (int r = 0; r < kRows; ++r)
        if (!m.sound(r, static_cast<double>(cols))) m.set_exact(r, exact_moments(in + r * cols, cols, 1), eps);
    for (int r = 0; r < kRows; ++r) {
      mean[row + r] = m.mean[r], rstd[row + r] = m.rstd[r];
      center[r] = V(m.center[r]), scale[r] = V(m.rstd[r]), offset[r] = V(m.offset[r]);
    }
    normalize<kRows>(row, center, scale, offset);
  }

  template <int kRows>
  void normalize(int64_t row, const V (&center)[kRows], const V (&scale)[kRows], const V (&offset)[kRows]) const {
    constexpr int64_t L = V::size();
    const T* const in = x + row * this->cols;
    T* const out = y + row * this->cols;
    const S *const weight = this->weight, *const bias = this->bias;  // a store might change members, but not these
    const int64_t cols = this->cols, ahead = rows_ahead<T>(cols);
    const bool stream = this->stream;
    int64_t j = 0;
    for (; j + L <= cols; j += L) {
      const V w = V::loadu(weight + j), b = V::loadu(bias + j);
      for (int r = 0; r < kRows; ++r) {
        __builtin_prefetch(in + r * cols + j + ahead, 0, 2);
        const V xhat = at::vec::fmadd(vload(in + r * cols + j) - center[r], scale[r], offset[r]);
        vput(out + r * cols + j, at::vec::fmadd(xhat, w, b), stream);
      }
    }
    if (const int64_t n = cols - j; n > 0) {
      const V w = vload(weight + j, n, V(0)), b = vload(bias + j, n, V(0));
      for (int r = 0; r < kRows; ++r) {
        const V xhat = at::vec::fmadd(vload(in + r * cols + j, n, V(0)) - center[r], scale[r], offset[r]);
        vstore(out + r * cols + j, at::vec::fmadd(xhat, w, b), n);
      }
    }
  }

  void run(int64_t rows) const {
    const auto groups = [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(rows, end * kGroup);
      int64_t row = begin * kGroup;
      for (; row + kGroup <= last; row += kGroup) group<kGroup>(row);
      for (; row < last; ++row) group<1>(row);
      stream_fence();
    };
    const int64_t count = divup(rows, kGroup);
    if (rows * cols < kSerial || count == 1)
      groups(0, count);
    else
      at::parallel_for(0, count, divup(kSerial / 2, kGroup * cols), groups);
  }
};

// Sums over rows for columns [begin, end) of both parameters: in the arithmetic type, moved to double from time to time.
template <typename S>
class ColumnSums {
 public:
  ColumnSums(int64_t begin, int64_t end, double* totals, int64_t total_stride)
      : begin_(begin), width_(end - begin), totals_(totals), stride_(total_stride), acc_(std::make_unique<S[]>(2 * width_)) {}
  S* weight() { return acc_.get() - begin_; }
  S* bias() { return acc_.get() + width_ - begin_; }
  void added(int64_t rows) {
    if ((pending_ += rows) + kGroup > kRun) flush();
  }
  // Moves the sums in the arithmetic type to double.
  void flush() {
    for (int k = 0; k < 2; ++k)
      for (int64_t j = 0; j < width_; ++j) {
        double& total = totals_[k * stride_ + j];
        total = (flushed_ ? total : 0.0) + acc_[k * width_ + j];
        acc_[k * width_ + j] = 0;
      }
    flushed_ = true, pending_ = 0;
  }

 private:
  int64_t begin_, width_;
  double* totals_;
  int64_t stride_, pending_ = 0;
  bool flushed_ = false;
  std::unique_ptr<S[]> acc_;
};

template <typename T>
struct Backward {
  using S = compute_t<T>;
  using V = Vec<T>;
  const T *dy, *x;
  T* dx;  // nullptr if not needed
  const S *mean, *rstd, *weight;
  int64_t cols;
  bool sums;  // whether the parameters' gradients are needed
  bool stream;

  // dx = (dy * weight - level - xhat * slope) * rstd: in this order the terms cancel before they are scaled.
  struct Terms {
    S level, slope;
  };

  template <int kRows>
  C10_NOINLINE void terms(int64_t row, Terms* out) const {
    const T *const g = dy + row * cols, *const in = x + row * cols;
    V center[kRows];
    for (int r = 0; r < kRows; ++r) center[r] = V(mean[row + r]);
    double sum[kRows] = {}, product[kRows] = {};
    sum_columns<T, 2, kRows>(cols, {sum, product}, [&](int r, int64_t j, int64_t n, auto partial, auto& sums) {
      constexpr bool kPartial = decltype(partial)::value;
      const V gw = load<kPartial>(g + r * cols + j, n, V(0)) * load<kPartial>(weight + j, n, V(0));
      sums[0] = sums[0] + gw;
      sums[1] = at::vec::fmadd(gw, load<kPartial>(in + r * cols + j, n, center[r]) - center[r], sums[1]);
    });
    for (int r = 0; r < kRows; ++r) {
      const double scale = rstd[row + r];
      out[r] = {static_cast<S>(sum[r] / cols), static_cast<S>(product[r] / cols * scale)};
    }
  }

  template <int kRows>
  C10_NOINLINE void gradients(int64_t row, int64_t begin, int64_t end, const Terms* t, S* dweight, S* dbias) const {
    constexpr int64_t L = V::size();
    const int64_t cols = this->cols, ahead = rows_ahead<T>(cols);  // a store might change members, but not these
    const bool stream = this->stream;
    const S* const weight = this->weight;
    T* const out = dx == nullptr ? nullptr : dx + row * cols;
    const bool sums = this->sums;
    const T *const g = dy + row * cols, *const in = x + row * cols;
    V center[kRows], scale[kRows], level[kRows], slope[kRows];
    for (int r = 0; r < kRows; ++r) {
      center[r] = V(mean[row + r]), scale[r] = V(rstd[row + r]);
      level[r] = V(t[r].level), slope[r] = V(t[r].slope);
    }
    const auto columns = [&](int64_t j, int64_t n, auto partial) {
      constexpr bool kPartial = decltype(partial)::value;
      const V w = load<kPartial>(weight + j, n, V(0));
      V dw = sums ? load<kPartial>(dweight + j, n, V(0)) : V(0), db = sums ? load<kPartial>(dbias + j, n, V(0)) : V(0);
      for (int r = 0; r < kRows; ++r) {
        __builtin_prefetch(g + r * cols + j + ahead, 0, 2), __builtin_prefetch(in + r * cols + j + ahead, 0, 2);
        const V gr = load<kPartial>(g + r * cols + j, n, V(0));
        const V d = load<kPartial>(in + r * cols + j, n, center[r]) - center[r];
        const V xhat = d * scale[r];
        dw = at::vec::fmadd(gr, xhat, dw), db = db + gr;
        if (out != nullptr) {
          const V result = at::vec::fnmadd(xhat, slope[r], gr * w - level[r]) * scale[r];
          kPartial ? vstore(out + r * cols + j, result, n) : vput(out + r * cols + j, result, stream);
        }
      }
      if (sums) {
        kPartial ? vstore(dweight + j, dw, n) : vstore(dweight + j, dw);
        kPartial ? vstore(dbias + j, db, n) : vstore(dbias + j, db);
      }
    };
    int64_t j = begin;
    for (; j + L <= end; j += L) columns(j, L, std::false_type{});
    if (j < end) columns(j, end - j, std::true_type{});
  }

  // f(number of rows as a type, first row) for groups of rows
  template <typename F>
  static void over_groups(int64_t begin, int64_t end, const F& f) {
    for (; begin + kGroup <= end; begin += kGroup) f(std::integral_constant<int, kGroup>{}, begin);
    for (; begin < end; ++begin) f(std::integral_constant<int, 1>{}, begin);
  }

  void rows_of(int64_t begin, int64_t end, ColumnSums<S>& sums_) const {
    over_groups(begin, end, [&](auto count, int64_t row) {
      constexpr int kRows = decltype(count)::value;
      Terms t[kRows] = {};
      if (dx != nullptr) terms<kRows>(row, t);
      gradients<kRows>(row, 0, cols, t, sums_.weight(), sums_.bias());
      if (sums) sums_.added(kRows);
    });
    stream_fence();
  }

  void run(int64_t rows, const Tensor& dweight, const Tensor& dbias) const {
    const int64_t numel = rows * cols;
    const auto parallel = [&](int64_t n, const auto& f) {
      if (numel < kSerial || n == 1)
        f(int64_t{0}, n);
      else
        at::parallel_for(0, n, 1, f);
    };
    const bool by_columns = rows < kFewRows && cols >= kLongRow && numel >= 2 * kSerial;
    const int64_t groups = divup(rows, kGroup), pieces = by_columns ? 1 : pieces_of(groups, kLeastGroups, numel);
    const auto totals = std::make_unique_for_overwrite<double[]>(sums ? pieces * 2 * cols : 0);
    if (by_columns) {
      const auto t = std::make_unique<Terms[]>(rows);
      if (dx != nullptr)
        parallel(groups, [&](int64_t begin, int64_t end) {
          over_groups(begin * kGroup, std::min(rows, end * kGroup),
                      [&](auto count, int64_t row) { terms<decltype(count)::value>(row, &t[row]); });
        });
      parallel(divup(cols, kColumns), [&](int64_t first, int64_t last) {
        for (int64_t part = first; part < last; ++part) {
          const int64_t begin = part * kColumns, end = std::min(cols, begin + kColumns);
          ColumnSums<S> columns(begin, end, totals.get() + begin, cols);
          over_groups(0, rows, [&](auto count, int64_t row) {
            gradients<decltype(count)::value>(row, begin, end, &t[row], columns.weight(), columns.bias());
          });
          if (sums) columns.flush();
        }
        stream_fence();
      });
    } else {
      parallel(pieces, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          ColumnSums<S> columns(0, sums ? cols : 0, totals.get() + p * 2 * cols, cols);
          rows_of(p * groups / pieces * kGroup, std::min(rows, (p + 1) * groups / pieces * kGroup), columns);
          if (sums) columns.flush();
        }
      });
    }
    if (!sums) return;
    parallel(divup(cols, kColumns), [&](int64_t first, int64_t last) {
      const int64_t begin = first * kColumns, end = std::min(cols, last * kColumns);
      for (int k = 0; k < 2; ++k) {
        double* const total = totals.get() + k * cols;
        for (int64_t p = 1; p < pieces; ++p)
          for (int64_t j = begin; j < end; ++j) total[j] += totals[p * 2 * cols + k * cols + j];
        store_gradient<T>(k == 0 ? dweight : dbias, begin, end, [&](int64_t j) { return total[j]; });
      }
    });
  }
};

}  // namespace

void layer_norm_rows(const Tensor& x, int64_t cols, const Tensor& weight, const Tensor& bias, double eps, const Tensor& y,
                     const Tensor& mean, const Tensor& rstd) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "layer_norm", [&] {
    using S = compute_t<scalar_t>;
    const ParameterValues<scalar_t> w(weight, cols, 1), b(bias, cols, 0);
    scalar_t* const out = y.mutable_data_ptr<scalar_t>();
    Forward<scalar_t>{.x = x.const_data_ptr<scalar_t>(),
                      .y = out,
                      .mean = mean.mutable_data_ptr<S>(),
                      .rstd = rstd.mutable_data_ptr<S>(),
                      .weight = w.data(),
                      .bias = b.data(),
                      .cols = cols,
                      .eps = eps,
                      .stream = streams(out, x.numel(), cols)}
        .run(x.numel() / cols);
  });
}

void layer_norm_rows_backward(const Tensor& dy, const Tensor& x, int64_t cols, const Tensor& weight, const Tensor& mean,
                              const Tensor& rstd, const Tensor& dx, const Tensor& dweight, const Tensor& dbias) {
  const bool sums = dweight.defined() || dbias.defined();
  if (!dx.defined() && !sums) return;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "layer_norm_backward", [&] {
    using S = compute_t<scalar_t>;
    const ParameterValues<scalar_t> w(weight, cols, 1);
    scalar_t* const out = dx.defined() ? dx.mutable_data_ptr<scalar_t>() : nullptr;
    Backward<scalar_t>{.dy = dy.const_data_ptr<scalar_t>(),
                       .x = x.const_data_ptr<scalar_t>(),
                       .dx = out,
                       .mean = mean.const_data_ptr<S>(),
                       .rstd = rstd.const_data_ptr<S>(),
                       .weight = w.data(),
                       .cols = cols,
                       .sums = sums,
                       .stream = streams(out, x.numel(), cols)}
        .run(x.numel() / cols, dweight, dbias);
  });
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_cpu(const Tensor& x, at::IntArrayRef normalized_shape,
                                                  const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                                  bool wide) {
  check_layer_norm("cnnkern::layer_norm", x, normalized_shape, weight, bias, wide);
  const Tensor x_ = with_plain_strides(widened(x, wide).contiguous());
  Tensor y = aten::empty_like(x_);
  auto [mean, rstd] = empty_statistics(x_, x.dim() - static_cast<int64_t>(normalized_shape.size()), x.dim());
  if (x.numel() == 0) return {y, mean.zero_(), rstd.fill_(1)};
  layer_norm_rows(x_, c10::multiply_integers(normalized_shape), tensor_or_undefined(weight), tensor_or_undefined(bias), eps,
                  y, mean, rstd);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(const Tensor& dy, const Tensor& x,
                                                           at::IntArrayRef normalized_shape, const OptionalTensor& weight,
                                                           const OptionalTensor& bias, const Tensor& mean,
                                                           const Tensor& rstd, std::array<bool, 3> output_mask) {
  const char* op = "cnnkern::layer_norm_backward";
  check_layer_norm(op, x, normalized_shape, weight, bias, is_wide(dy, x));
  const int64_t first = x.dim() - static_cast<int64_t>(normalized_shape.size());
  check_layer_norm_saved(op, dy, x, statistics_shape(x, first, x.dim()), weight, bias, mean, rstd, output_mask);
  if (is_wide(dy, x))
    return narrowed(layer_norm_backward_cpu(dy, widened(x, true), normalized_shape, weight, bias, mean, rstd, output_mask), x);
  const Tensor x_ = with_plain_strides(x.contiguous()), dy_ = dy.contiguous();
  LayerNormGradients grads(x_, normalized_shape, weight, bias, output_mask);
  if (x.numel() == 0) return grads.zeros(x);
  layer_norm_rows_backward(dy_, x_, c10::multiply_integers(normalized_shape), tensor_or_undefined(weight), mean, rstd,
                           grads.dx, grads.dweight, grads.dbias);
  return grads.tuple(x);
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
