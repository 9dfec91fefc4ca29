// The E-step of Gaussian mixtures on a CPU: responsibilities and sums of whitened points in one pass, and its gradient.
//
// For each set b, point n and component k, with y = W_k (x_n - mu_k):
//   g_nk = peak_k - |y|^2 / 2,  r_nk = softmax_k(g_nk),  sums_k = sum_n w_n r_nk [1, y, s(y)],
// where s(y) holds the products y_i y_j (j <= i), the squares y_i^2, or |y|^2. Whitened points are of order one, however
// thin a component is, so that float32 suffices for float32 points. Sums of blocks are added in double, in which they
// become the sums of [1, z, s(z)], with z = (x - center) / unit = mu_k + L_k y and s(z) holding z_i z_j for i <= j.
//
// Compiled once per kind of covariance, number of features and dtype: REAL is float or double, KIND 0 (full, FEATURES
// features), 1 (diagonal) or 2 (spherical). Vectors are those of GCC and Clang; no option such as -ffast-math is needed,
// so that infinities and NaN keep their meaning.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

using Real = REAL;
constexpr bool kSingle = std::is_same<Real, float>::value;
using Int = std::conditional<kSingle, int32_t, int64_t>::type;
typedef Real V __attribute__((vector_size(kBytes)));
typedef Int I __attribute__((vector_size(kBytes)));

constexpr int kLanes = kBytes / sizeof(Real);
constexpr int kSteps = 128 / kLanes;    // vectors per feature of a block: a block stays in the first-level cache
constexpr int kBlocksPerSum = 4;        // blocks that are added up in Real, before they are added in double
constexpr int64_t kRowsPerTask = 2048;  // fixed, so that results do not depend on the number of threads
constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// 2^x for x <= 0; 0 below the range of Real.
inline V exp2(V x) {
  constexpr int digits = kSingle ? 23 : 52;
  constexpr Real bias = kSingle ? 127 : 1023;
  constexpr Real magic = Real(1.5) * Real(Int(1) << digits) + bias;  // adding it rounds to an integer
  // Taylor's series in double, and a minimax polynomial in float, on [-1/2, 1/2].
  constexpr double taylor[] = {1.0,
                               0.6931471805599453,
                               0.2402265069591007,
                               0.055504108664821576,
                               0.009618129107628477,
                               0.0013333558146428441,
                               0.00015403530393381606,
                               1.5252733804059838e-05,
                               1.3215486790144305e-06,
                               1.0178086009239696e-07,
                               7.054911620801121e-09,
                               4.44553827187081e-10,
                               2.5678435993488196e-11,
                               1.3691488853904124e-12};
  constexpr double minimax[] = {1.0000000716553024,   0.6931469670628844,   0.24022119720751156,
                                0.055507132750642306, 0.0096755415026442,   0.0013276471960235736};
  const V shifted = x + magic;
  const V fraction = x - (shifted - magic);
  V power = V{} + Real(kSingle ? minimax[5] : taylor[13]);
  for (int i = kSingle ? 4 : 12; i >= 0; --i) power = power * fraction + Real(kSingle ? minimax[i] : taylor[i]);
  const V scale = (V)((I)shifted << digits);
  return x < Real(1 - bias) ? V{} : power * scale;
}

// log2(x) for x >= 1.
inline V log2(V x) {
  constexpr int digits = kSingle ? 23 : 52;
  constexpr Int root = kSingle ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcdLL);  // the bits of sqrt(1/2)
  const I exponent = ((I)x - root) >> digits;
  const V mantissa = (V)((I)x - (exponent << digits));
  const V ratio = (mantissa - Real(1)) / (mantissa + Real(1)), square = ratio * ratio;
  constexpr int terms = kSingle ? 5 : 11;
  V series = V{} + Real(1.0 / (2 * terms - 1));
  for (int i = terms - 2; i >= 0; --i) series = series * square + Real(1.0 / (2 * i + 1));
  return Real(2 * kLog2e) * ratio * series + __builtin_convertvector(exponent, V) + (x - x);  // NaN stays NaN
}

struct Problem {
  int64_t sets, components, features, items;
  const Real* x;
  int64_t set_stride, feature_stride, item_stride;
  const double *weights, *means, *inverse, *peak, *scale, *center, *unit;
  const double *grads, *grad_log_likelihood;  // null in the forward pass
  double *sums, *log_likelihood;
  Real* grad_x;
  double* grad_weights;
};

#if KIND == 0
// Full covariances: everything about one vector of points is in registers.
constexpr int D = FEATURES;
inline int num_sums(int64_t) { return 1 + D + D * (D + 1) / 2; }
inline int factor_size(int64_t) { return D * D; }
inline int lower(int i, int j) { return 1 + D + i * (i + 1) / 2 + j; }              // the place of y_i y_j, j <= i
inline int upper(int i, int j) { return 1 + D + i * D - i * (i - 1) / 2 + j - i; }  // the place of z_i z_j, i <= j

// The sums of [1, z, s(z)] for those of [1, y, s(y)].
inline void unwhiten(const double* sums, const double* scale, const double* mu, int64_t, double* result) {
  double shift[D] = {};
  for (int i = 0; i < D; ++i)
    for (int j = 0; j <= i; ++j) shift[i] += scale[i * D + j] * sums[1 + j];
  result[0] = sums[0];
  for (int i = 0; i < D; ++i) {
    result[1 + i] = mu[i] * sums[0] + shift[i];
    for (int j = i; j < D; ++j) {
      double total = mu[j] * result[1 + i] + mu[i] * shift[j];
      for (int a = 0; a <= i; ++a)
        for (int b = 0; b <= j; ++b)
          total += scale[i * D + a] * scale[j * D + b] * sums[lower(std::max(a, b), std::min(a, b))];
      result[upper(i, j)] = total;
    }
  }
}

// The transpose of unwhiten: the gradient of [1, y, s(y)] for that of [1, z, s(z)].
inline void whiten_gradient(const double* grads, const double* scale, const double* mu, int64_t, Real* result) {
  double own[1 + D + D * (D + 1) / 2] = {grads[0]}, linear[D];
  for (int i = 0; i < D; ++i) linear[i] = grads[1 + i];
  for (int i = 0; i < D; ++i) {
    own[0] += mu[i] * grads[1 + i];
    for (int j = i; j < D; ++j) {
      const double pair = grads[upper(i, j)];
      own[0] += pair * mu[i] * mu[j];
      linear[i] += pair * mu[j];
      linear[j] += pair * mu[i];
      for (int a = 0; a <= i; ++a)
        for (int b = 0; b <= j; ++b)
          own[lower(std::max(a, b), std::min(a, b))] += pair * scale[i * D + a] * scale[j * D + b];
    }
  }
  for (int i = 0; i < D; ++i)
    for (int j = 0; j <= i; ++j) own[1 + j] += scale[i * D + j] * linear[i];
  std::copy(own, own + num_sums(D), result);
}

// The gradients of peak, mean and W for the sums of [1, y, s(y)] under the derivative of g.
inline void parameter_gradient(const double* sums, const double* scale, const double* w, int64_t, double* result) {
  std::fill(result, result + 1 + D + D * D, 0.0);
  result[0] = sums[0];
  for (int i = 0; i < D; ++i)
    for (int j = 0; j <= i; ++j) {
      result[1 + j] += w[i * D + j] * sums[1 + i];
      for (int a = 0; a <= j; ++a) result[1 + D + i * D + j] -= sums[lower(i, a)] * scale[j * D + a];
    }
}

struct Component {
  Real peak, mean[D], offset[D], inverse[D][D];

  Component(const double* w, const double* mu, double top, int64_t) : peak(top * kLog2e) {
    for (int i = 0; i < D; ++i) mean[i] = Real(mu[i]);
    for (int i = 0; i < D; ++i) {
      double rest = 0.0;  // what rounding the mean leaves, so that it costs no precision
      for (int j = 0; j <= i; ++j) rest += w[i * D + j] * (double(mean[j]) - mu[j]);
      offset[i] = Real(rest);
      for (int j = 0; j <= i; ++j) inverse[i][j] = Real(w[i * D + j]);
    }
  }

  // Keeps whitened points, as loading them is faster than computing them again.
  void score(const V* u, int steps, V* white, V* score) const {
    for (int s = 0; s < steps; ++s) {
      V difference[D], square = V{};
      for (int i = 0; i < D; ++i) difference[i] = u[i * kSteps + s] - mean[i];
      for (int i = 0; i < D; ++i) {
        V y = V{} + offset[i];
        for (int j = 0; j <= i; ++j) y += inverse[i][j] * difference[j];
        square += y * y;
        white[i * kSteps + s] = y;
      }
      score[s] = peak - Real(0.5 * kLog2e) * square;
    }
  }

  // sums += sum r [1, y, y_i y_j]
  void add(const V*, const V* white, int steps, const V* r, V* sums) const {
    V own[1 + D + D * (D + 1) / 2];
    std::copy(sums, sums + num_sums(D), own);
    for (int s = 0; s < steps; ++s) {
      V y[D];
      for (int i = 0; i < D; ++i) y[i] = white[i * kSteps + s];
      own[0] += r[s];
      int pair = 1 + D;
      for (int i = 0; i < D; ++i) {
        const V weighted = r[s] * y[i];
        own[1 + i] += weighted;
        for (int j = 0; j <= i; ++j) own[pair++] += weighted * y[j];
      }
    }
    std::copy(own, own + num_sums(D), sums);
  }

  // slope = gradient . [1, y, y_i y_j]
  void slope(const V*, const V* white, int steps, const Real* gradient, V* slope) const {
    for (int s = 0; s < steps; ++s) {
      V y[D], total = V{} + gradient[0];
      for (int i = 0; i < D; ++i) y[i] = white[i * kSteps + s];
      int pair = 1 + D;
      for (int i = 0; i < D; ++i) {
        V inner = V{} + gradient[1 + i];
        for (int j = 0; j <= i; ++j) inner += gradient[pair++] * y[j];
        total += inner * y[i];
      }
      slope[s] = total;
    }
  }

  // grad_u += W^T (r d(gradient . [1, y, y_i y_j]) / dy - slope y)
  void pull(const V*, const V* white, int steps, const Real* gradient, const V* r, const V* slope, V* grad_u) const {
    for (int s = 0; s < steps; ++s) {
      V y[D], inner[D];
      for (int i = 0; i < D; ++i) {
        y[i] = white[i * kSteps + s];
        inner[i] = V{} + gradient[1 + i];
      }
      int pair = 1 + D;
      for (int i = 0; i < D; ++i)
        for (int j = 0; j <= i; ++j, ++pair) {
          inner[i] += gradient[pair] * y[j];
          inner[j] += gradient[pair] * y[i];
        }
      for (int i = 0; i < D; ++i) {
        const V outer = r[s] * inner[i] - slope[s] * y[i];
        for (int j = 0; j <= i; ++j) grad_u[j * kSteps + s] += inverse[i][j] * outer;
      }
    }
  }
};
#else
// Diagonal and spherical covariances of any number of features: one feature at a time.
constexpr int D = 0;  // whitened points are not kept
constexpr bool kDiagonal = KIND == 1;
inline int num_sums(int64_t features) { return kDiagonal ? 1 + 2 * features : 2 + features; }
inline int factor_size(int64_t features) { return kDiagonal ? features : 1; }

// See the functions of the same names for full covariances.
inline void unwhiten(const double* sums, const double* scale, const double* mu, int64_t features, double* result) {
  std::fill(result, result + num_sums(features), 0.0);
  result[0] = sums[0];
  for (int i = 0; i < features; ++i) {
    const double own = scale[kDiagonal ? i : 0], shift = own * sums[1 + i];
    double& second = result[1 + features + (kDiagonal ? i : 0)];
    result[1 + i] = mu[i] * sums[0] + shift;
    second += mu[i] * (result[1 + i] + shift);
    if (kDiagonal || i == 0) second += own * own * sums[1 + features + i];
  }
}

inline void whiten_gradient(const double* grads, const double* scale, const double* mu, int64_t features,
                            Real* result) {
  double zeroth = grads[0];
  for (int i = 0; i < features; ++i) {
    const int second = 1 + features + (kDiagonal ? i : 0);
    const double own = scale[kDiagonal ? i : 0];
    zeroth += mu[i] * (grads[1 + i] + mu[i] * grads[second]);
    result[1 + i] = Real(own * (grads[1 + i] + 2 * mu[i] * grads[second]));
    result[second] = Real(own * own * grads[second]);
  }
  result[0] = Real(zeroth);
}

inline void parameter_gradient(const double* sums, const double* scale, const double* w, int64_t features,
                               double* result) {
  result[0] = sums[0];
  for (int i = 0; i < features; ++i) result[1 + i] = w[kDiagonal ? i : 0] * sums[1 + i];
  for (int i = 0; i < factor_size(features); ++i) result[1 + features + i] = -scale[i] * sums[1 + features + i];
}

struct Component {
  Real peak;
  int features;
  std::vector<Real> mean, offset, inverse;

  Component(const double* w, const double* mu, double top, int64_t d)
      : peak(top * kLog2e), features(d), mean(mu, mu + d), offset(d), inverse(d) {
    for (int i = 0; i < features; ++i) {
      const double own = w[kDiagonal ? i : 0];
      inverse[i] = Real(own);
      offset[i] = Real(own * (double(mean[i]) - mu[i]));  // what rounding the mean leaves
    }
  }

  void score(const V* u, int steps, V*, V* score) const {
    V square[kSteps] = {};
    for (int i = 0; i < features; ++i)
      for (int s = 0; s < steps; ++s) {
        const V y = whitened(u, i, s);
        square[s] += y * y;
      }
    for (int s = 0; s < steps; ++s) score[s] = peak - Real(0.5 * kLog2e) * square[s];
  }

  void add(const V* u, const V*, int steps, const V* r, V* sums) const {
    for (int s = 0; s < steps; ++s) sums[0] += r[s];
    V all = V{};
    for (int i = 0; i < features; ++i) {
      V first = sums[1 + i], second = V{};
      for (int s = 0; s < steps; ++s) {
        const V y = whitened(u, i, s), weighted = r[s] * y;
        first += weighted;
        second += weighted * y;
      }
      sums[1 + i] = first;
      if (kDiagonal) sums[1 + features + i] += second;
      all += second;
    }
    if (!kDiagonal) sums[1 + features] += all;
  }

  void slope(const V* u, const V*, int steps, const Real* gradient, V* slope) const {
    for (int s = 0; s < steps; ++s) slope[s] = V{} + gradient[0];
    for (int i = 0; i < features; ++i) {
      const Real second = gradient[1 + features + (kDiagonal ? i : 0)];
      for (int s = 0; s < steps; ++s) {
        const V y = whitened(u, i, s);
        slope[s] += y * (gradient[1 + i] + second * y);
      }
    }
  }

  void pull(const V* u, const V*, int steps, const Real* gradient, const V* r, const V* slope, V* grad_u) const {
    for (int i = 0; i < features; ++i) {
      const Real first = gradient[1 + i], second = 2 * gradient[1 + features + (kDiagonal ? i : 0)];
      for (int s = 0; s < steps; ++s) {
        const V y = whitened(u, i, s);
        grad_u[i * kSteps + s] += inverse[i] * (r[s] * (first + second * y) - slope[s] * y);
      }
    }
  }

 private:
  V whitened(const V* u, int i, int s) const { return inverse[i] * (u[i * kSteps + s] - mean[i]) + offset[i]; }
};
#endif

// The rows of one set that one thread works on at a time.
struct Task {
  const Problem& p;
  const int64_t set, first, last;
  const int64_t K, M;  // components, and sums per component
  std::vector<V> u, white, weights, score, slope, largest, total, mean, grad_u, sums;
  std::vector<Real> gradients;
  std::vector<double> wide;
  std::vector<Component> components;
  Real unit;  // of points in this code, the reciprocal

  Task(const Problem& problem, int64_t set, int64_t first, int64_t last)
      : p(problem), set(set), first(first), last(last), K(p.components), M(num_sums(p.features)),
        u(p.features * kSteps), white(K * D * kSteps), weights(kSteps), score(K * kSteps), slope(p.grads ? K * kSteps : 0), largest(kSteps),
        total(kSteps), mean(kSteps), grad_u(p.grad_x ? p.features * kSteps : 0), sums(K * M + 1),
        gradients(p.grads ? K * M : 0), wide((K * M + 1) * kLanes) {
    // Differences of points and means need no centered points. Their unit and W stay normal numbers in Real, and so do
    // the squares of whitened points.
    using Limits = std::numeric_limits<Real>;
    const double own = std::min(std::max(p.unit[set], double(Limits::min())), 1.0 / double(Limits::min()));
    const double ratio = own / p.unit[set], bound = std::pow(double(Limits::max()), 0.4);
    const int64_t features = p.features, size = factor_size(features);
    unit = Real(1.0 / own);
    std::vector<double> mean(features), inverse(size);
    components.reserve(K);
    for (int64_t k = set * K; k < (set + 1) * K; ++k) {
      for (int64_t i = 0; i < features; ++i)
        mean[i] = p.means[k * features + i] / ratio + p.center[set * features + i] / own;
      for (int64_t i = 0; i < size; ++i)
        inverse[i] = std::min(std::max(p.inverse[k * size + i] * ratio, -bound), bound);
      components.emplace_back(inverse.data(), mean.data(), p.peak[k], features);
      if (p.grads)
        whiten_gradient(p.grads + k * M, p.scale + k * size, p.means + k * features, features,
                        &gradients[(k - set * K) * M]);
    }
  }

  // Writes K M sums, and the log-likelihood after them.
  void run(double* result) {
    constexpr int rows = kSteps * kLanes;
    int pending = 0;
    for (int64_t row = first; row < last; row += rows) {
      const int count = std::min<int64_t>(rows, last - row);
      const int steps = (count + kLanes - 1) / kLanes;
      load(row, count, steps * kLanes);
      evaluate(steps);
      if (p.grads) {
        backward(row, count, steps);
      } else {
        forward(steps);
      }
      if (++pending == kBlocksPerSum || row + rows >= last) {
        const Real* narrow = reinterpret_cast<const Real*>(sums.data());
        for (size_t i = 0; i < wide.size(); ++i) wide[i] += double(narrow[i]);
        std::fill(sums.begin(), sums.end(), V{});
        pending = 0;
      }
    }
    for (int64_t i = 0; i <= K * M; ++i) {
      result[i] = 0.0;
      for (int lane = 0; lane < kLanes; ++lane) result[i] += wide[i * kLanes + lane];
    }
  }

 private:
  // Copies rows, feature by feature. Rows that fill up the last vector repeat the last row with weight zero.
  void load(int64_t row, int count, int padded) {
    for (int64_t i = 0; i < p.features; ++i) {
      const Real* from = p.x + set * p.set_stride + i * p.feature_stride + row * p.item_stride;
      Real* to = reinterpret_cast<Real*>(&u[i * kSteps]);
      for (int n = 0; n < count; ++n) to[n] = from[n * p.item_stride] * unit;
      std::fill(to + count, to + padded, to[count - 1]);
    }
    Real* to = reinterpret_cast<Real*>(weights.data());
    for (int n = 0; n < count; ++n) to[n] = p.weights ? Real(p.weights[set * p.items + row + n]) : Real(1);
    std::fill(to + count, to + padded, Real(0));
  }

  // Leaves exp(g - largest) in score, in units of log 2, and its sum over components in total.
  void evaluate(int steps) {
    for (int64_t k = 0; k < K; ++k) {
      V* own = &score[k * kSteps];
      components[k].score(u.data(), steps, white.data() + k * D * kSteps, own);
      if (k == 0) std::copy(own, own + steps, largest.begin());
      for (int s = 0; s < steps; ++s) largest[s] = own[s] > largest[s] ? own[s] : largest[s];
    }
    std::fill(total.begin(), total.end(), V{});
    for (int64_t k = 0; k < K; ++k) {
      V* own = &score[k * kSteps];
      for (int s = 0; s < steps; ++s) {
        own[s] = exp2(own[s] - largest[s]);
        total[s] += own[s];
      }
    }
  }

  void forward(int steps) {
    if (p.log_likelihood)
      for (int s = 0; s < steps; ++s) sums[K * M] += weights[s] * Real(kLn2) * (largest[s] + log2(total[s]));
    for (int s = 0; s < steps; ++s) total[s] = weights[s] / total[s];
    for (int64_t k = 0; k < K; ++k) {
      V* own = &score[k * kSteps];
      for (int s = 0; s < steps; ++s) own[s] *= total[s];
      components[k].add(u.data(), white.data() + k * D * kSteps, steps, own, &sums[k * M]);
    }
  }

  // The derivative of the joint log-density g_nk is w_n r_nk (a_nk - sum_j r_nj a_nj + l), where a_nk is the derivative
  // of sums_k in w_n r_nk and l that of the log-likelihood. Sums over points of [1, y, s(y)] under it give those of the
  // parameters.
  void backward(int64_t row, int count, int steps) {
    const Real outer = Real(p.grad_log_likelihood[set]);
    std::fill(mean.begin(), mean.end(), V{});
    for (int64_t k = 0; k < K; ++k) {
      V *r = &score[k * kSteps], *a = &slope[k * kSteps];
      components[k].slope(u.data(), white.data() + k * D * kSteps, steps, &gradients[k * M], a);
      for (int s = 0; s < steps; ++s) {
        r[s] /= total[s];
        mean[s] += r[s] * a[s];
      }
    }
    if (p.grad_weights) {
      V of_weights[kSteps];
      for (int s = 0; s < steps; ++s) of_weights[s] = mean[s] + outer * Real(kLn2) * (largest[s] + log2(total[s]));
      const Real* found = reinterpret_cast<const Real*>(of_weights);
      std::copy(found, found + count, p.grad_weights + set * p.items + row);
    }
    std::fill(grad_u.begin(), grad_u.end(), V{});
    for (int64_t k = 0; k < K; ++k) {
      V *r = &score[k * kSteps], *a = &slope[k * kSteps];
      for (int s = 0; s < steps; ++s) {
        r[s] *= weights[s];
        a[s] = r[s] * (a[s] - mean[s] + outer);
      }
      components[k].add(u.data(), white.data() + k * D * kSteps, steps, a, &sums[k * M]);
      if (p.grad_x) components[k].pull(u.data(), white.data() + k * D * kSteps, steps, &gradients[k * M], r, a, grad_u.data());
    }
    if (p.grad_x)
      for (int64_t i = 0; i < p.features; ++i) {
        const Real* from = reinterpret_cast<const Real*>(&grad_u[i * kSteps]);
        Real* to = p.grad_x + (set * p.features + i) * p.items + row;
        for (int n = 0; n < count; ++n) to[n] = from[n] * unit;
      }
  }
};

}  // namespace

// Writes sums (B, K, M) and the log-likelihood (B,); with grads (B, K, M) it writes in place of the sums the gradients of
// peak, mean and W, and grad_x (B, D, N) and grad_weights (B, N) unless they are null.
extern "C" void em_lightning_e_step(const Problem* problem, int64_t threads) {
  const Problem& p = *problem;
  const int64_t size = p.components * num_sums(p.features) + 1;
  const int64_t tasks_per_set = std::max<int64_t>((p.items + kRowsPerTask - 1) / kRowsPerTask, 1);
  const int64_t tasks = p.sets * tasks_per_set;
  std::vector<double> results(tasks * size);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t first = task % tasks_per_set * kRowsPerTask;
      Task(p, task / tasks_per_set, first, std::min(first + kRowsPerTask, p.items)).run(&results[task * size]);
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min(threads, tasks); ++i) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
  const int64_t features = p.features, factor = factor_size(features), M = num_sums(features);
  for (int64_t set = 0; set < p.sets; ++set) {
    double* sums = &results[set * tasks_per_set * size];
    for (int64_t task = 1; task < tasks_per_set; ++task)
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[task * size + i];
    for (int64_t k = 0; k < p.components; ++k) {
      const int64_t place = set * p.components + k;
      const double* scale = p.scale + place * factor;
      if (p.grads) {
        parameter_gradient(sums + k * M, scale, p.inverse + place * factor, features,
                           p.sums + place * (1 + features + factor));
      } else {
        unwhiten(sums + k * M, scale, p.means + place * features, features, p.sums + place * M);
      }
    }
    if (p.log_likelihood) p.log_likelihood[set] = sums[size - 1];
  }
}
