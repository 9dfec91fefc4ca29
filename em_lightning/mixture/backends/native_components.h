// Vectors of float or double, and covariance types of whitened points, for native.cpp.
//
// A Component whitens points, y = W (u - mean), and works on sums of [1, y, s(y)], where s(y) holds the products y_i y_j
// (j <= i), the squares y_i^2, or |y|^2. A block u of points holds kSteps vectors per feature.

#include <algorithm>
#include <cstdint>
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

struct Taylor {
  double coefficients[14] = {1.0};  // log(2)^i / i!
  constexpr Taylor() {
    for (int i = 1; i < 14; ++i) coefficients[i] = coefficients[i - 1] * kLn2 / i;
  }
};

// 2^x for x <= 0; 0 below the range of Real.
inline V exp2(V x) {
  constexpr int digits = kSingle ? 23 : 52;
  constexpr Real bias = kSingle ? 127 : 1023;
  constexpr Real magic = Real(1.5) * Real(Int(1) << digits) + bias;  // adding it rounds to an integer
  const V shifted = x + magic;
  const V fraction = x - (shifted - magic);
  // Taylor's series on [-1/2, 1/2], whose error is 2e-7 or 5e-18.
  constexpr Taylor series;
  V power = V{} + Real(series.coefficients[kSingle ? 6 : 13]);
  for (int i = kSingle ? 5 : 12; i >= 0; --i) power = power * fraction + Real(series.coefficients[i]);
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

}  // namespace
