// Steps for one Gaussian component in double: the factor of its covariance, and its M-step without a prior.
//
// Triangles and symmetric matrices of D features are stored as D x D numbers. kSize is D where it is known to the
// compiler, otherwise 0.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace gaussian {

enum Kind : int64_t { kFull, kDiagonal, kSpherical };

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr double kAdded = 10.0 * kEpsilon;  // to each mass, as in scikit-learn

// Bound of entries of L relative to their largest possible size; above 1, so that round-off changes no valid entry.
constexpr double kBound = 1.001;

// The number of second sums, and of entries of a covariance.
inline int64_t num_second(int64_t kind, int64_t D) {
  return kind == kFull ? D * (D + 1) / 2 : kind == kDiagonal ? D : 1;
}
inline int64_t covariance_size(int64_t kind, int64_t D) { return kind == kFull ? D * D : num_second(kind, D); }

inline double average_square(const double* mean, int64_t D) {
  double total = 0.0;
  for (int64_t i = 0; i < D; ++i) total += mean[i] * mean[i];
  return total / D;
}

// The smallest variance distinguishable from round-off, as smallest_pivots in covariance/cholesky.py.
inline double smallest_variance(double second_moment) {
  constexpr double least = kEpsilon * kEpsilon * kEpsilon * kEpsilon;
  return std::max(4.0 * kEpsilon * second_moment, least);
}

// Writes the factor L and its inverse W of the lower triangle of a matrix. Pivots, the squared diagonal entries of L,
// are at least ``least`` (D). The squares of a row of L add up to the diagonal entry of the matrix, unless rounding
// made it indefinite. Therefore entries are bounded by the root of the diagonal entry.
template <int kSize>
void factorize(const double* matrix, const double* least, int64_t num_features, double* l, double* w) {
  const int64_t D = kSize > 0 ? kSize : num_features;
  for (int64_t i = 0; i < D; ++i) {
    const double bound = std::max(matrix[i * D + i], least[i]);
    double pivot = matrix[i * D + i];
    for (int64_t j = 0; j < i; ++j) {
      double entry = matrix[i * D + j];
      for (int64_t q = 0; q < j; ++q) entry -= l[i * D + q] * l[j * D + q];
      entry *= w[j * D + j];
      // Squares, to take a root only where an entry is bounded.
      if (entry * entry > kBound * kBound * bound) entry = std::copysign(kBound * std::sqrt(bound), entry);
      l[i * D + j] = entry;
      pivot -= entry * entry;
    }
    const double root = std::sqrt(pivot < least[i] ? least[i] : pivot), reciprocal = 1.0 / root;
    l[i * D + i] = root;
    w[i * D + i] = reciprocal;
    for (int64_t j = 0; j < i; ++j) {  // row i of L W = I
      double entry = 0.0;
      for (int64_t q = j; q < i; ++q) entry += l[i * D + q] * w[q * D + j];
      w[i * D + j] = -entry * reciprocal;
    }
    std::fill(l + i * D + i + 1, l + (i + 1) * D, 0.0);
    std::fill(w + i * D + i + 1, w + (i + 1) * D, 0.0);
  }
}

// The M-step: for the mass N, first sums f = sum_n r_n z_n and second sums s, with e = kAdded, writes
//   mean m = f / (N + e),  covariance C = (s - N m m^T) / (N + e) + floor I.
// Full covariances have sums s of the products z_i z_j for i <= j, diagonal ones those of the squares. Spherical ones
// have the sum of |z|^2, and their variance is the average over features. Variances of diagonal and spherical ones are
// at least the smallest that is distinguishable from round-off.
template <int kSize>
void estimate_full(int64_t num_features, double N, const double* first, const double* second, double floor,
                   double* mean, double* covariance) {
  const int64_t D = kSize > 0 ? kSize : num_features;
  const double share = 1.0 / (N + kAdded);
  for (int64_t i = 0; i < D; ++i) {
    const double own = mean[i] = first[i] * share;
    // Row i of the second sums follows the rows j < i, which have D - j entries.
    for (int64_t j = 0; j <= i; ++j) {
      const double sum = second[j * D - j * (j - 1) / 2 + i - j];
      const double entry = (sum - N * own * mean[j]) * share;
      covariance[i * D + j] = covariance[j * D + i] = i == j ? entry + floor : entry;
    }
  }
}

inline void estimate(int64_t kind, int64_t D, double N, const double* first, const double* second, double floor,
                     double* mean, double* covariance) {
  if (kind == kFull) {
    switch (D) {
      case 2: return estimate_full<2>(D, N, first, second, floor, mean, covariance);
      case 3: return estimate_full<3>(D, N, first, second, floor, mean, covariance);
      default: return estimate_full<0>(D, N, first, second, floor, mean, covariance);
    }
  }
  const double mass = N + kAdded;
  for (int64_t i = 0; i < D; ++i) mean[i] = first[i] / mass;
  for (int64_t i = 0; i < num_second(kind, D); ++i) {
    const double square = kind == kDiagonal ? mean[i] * mean[i] : average_square(mean, D);
    const double variance = (second[i] / (kind == kDiagonal ? 1 : D) - N * square) / mass;
    const double least = smallest_variance(std::abs(variance) + square);  // round-off may make variances negative
    covariance[i] = variance + floor < least ? least : variance + floor;
  }
}

// Writes the log-weights log((N_k + e) / sum_j (N_j + e)) of K masses, which are ``stride`` numbers apart.
inline void estimate_weights(int64_t K, const double* mass, int64_t stride, double* log_weights) {
  double total = 0.0;
  for (int64_t k = 0; k < K; ++k) total += mass[k * stride] + kAdded;
  for (int64_t k = 0; k < K; ++k) log_weights[k] = std::log((mass[k * stride] + kAdded) / total);
}

}  // namespace gaussian
