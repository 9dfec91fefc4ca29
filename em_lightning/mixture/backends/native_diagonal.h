// Diagonal and spherical covariances of any number of features: one feature at a time.
//
// A Component whitens points, y = W (u - mean), and works on sums of [1, y, s(y)], where s(y) holds the squares y_i^2
// for diagonal covariances, or |y|^2 for spherical ones. A block u of points holds kSteps vectors per feature.
// ``scale`` is L = W^-1, ``mu`` the mean. L and W have one entry per feature, or one in all for spherical covariances.
// Unnamed arguments are used by full covariances only.

#include "gaussian.h"
#include "native_vectors.h"

namespace {

constexpr int kRows = 0;        // rows of stored whitened points: none, because loading them would not be faster
constexpr int kUnrolled = 4;    // vectors per pass of a loop; steps are a multiple of it
constexpr int kGrain = kLanes;  // points that are skipped at a time, if their responsibilities are negligible
constexpr bool kDiagonal = KIND == 1;
inline int num_sums(int64_t features) { return kDiagonal ? 1 + 2 * features : 2 + features; }
inline int factor_size(int64_t features) { return kDiagonal ? features : 1; }
inline int entry_of(int i) { return kDiagonal ? i : 0; }  // of feature i in L and W
inline int square_of(int i, int64_t features) { return 1 + features + entry_of(i); }  // place of y_i^2 in the sums

// Writes L and W of a covariance, and returns log det W.
inline double factorize_covariance(const double* variances, const double* mu, int64_t features, double* l, double* w) {
  double log_det = 0.0;
  for (int64_t i = 0; i < factor_size(features); ++i) {
    const double square = kDiagonal ? mu[i] * mu[i] : gaussian::average_square(mu, features);
    l[i] = std::sqrt(std::max(variances[i], gaussian::smallest_variance(variances[i] + square)));
    w[i] = 1.0 / l[i];
    log_det += std::log(w[i]);
  }
  return kDiagonal ? log_det : features * log_det;
}

// Converts sums of [1, y, s(y)] to sums of [1, z, s(z)], z = mu + L y.
inline void unwhiten(const double* sums, const double* scale, const double* mu, int64_t features, double* result) {
  std::fill(result, result + num_sums(features), 0.0);
  result[0] = sums[0];
  for (int i = 0; i < features; ++i) {
    const double l = scale[entry_of(i)], shift = l * sums[1 + i];
    double& second = result[square_of(i, features)];
    result[1 + i] = mu[i] * sums[0] + shift;
    second += mu[i] * (result[1 + i] + shift);
    if (kDiagonal || i == 0) second += l * l * sums[1 + features + i];  // spherical: the sum of |y|^2, once
  }
}

// The transpose of unwhiten: converts the gradient in the sums of z to the gradient in the sums of y.
inline void whiten_gradient(const double* grads, const double* scale, const double* mu, int64_t features,
                            double* result) {
  result[0] = grads[0];
  for (int i = 0; i < features; ++i) {
    const int second = square_of(i, features);
    const double l = scale[entry_of(i)];
    result[0] += mu[i] * (grads[1 + i] + mu[i] * grads[second]);
    result[1 + i] = l * (grads[1 + i] + 2 * mu[i] * grads[second]);
    result[second] = l * l * grads[second];
  }
}

inline int gradient_size(int64_t features) { return num_sums(features); }

// The gradients of peak, mean and W from sums of [1, y, s(y)] weighted by the gradient in the joint log-density g_nk.
inline void parameter_gradient(const double* sums, const double* scale, const double* w, int64_t features,
                               double* result) {
  result[0] = sums[0];
  for (int i = 0; i < features; ++i) result[1 + i] = w[entry_of(i)] * sums[1 + i];
  for (int i = 0; i < factor_size(features); ++i) result[1 + features + i] = -scale[i] * sums[1 + features + i];
}

struct Component {
  Real peak;  // in units of log 2
  int features;
  std::vector<Real> offset, inverse;  // y = inverse (u - mean) = inverse u + offset

  Component(const double* w, const double* mu, double peak_in_nats, int64_t d)
      : peak(peak_in_nats * kLog2e), features(d), offset(d), inverse(d) {
    for (int i = 0; i < features; ++i) {
      const double own = rounded(w[entry_of(i)]);
      inverse[i] = Real(own);
      offset[i] = Real(-own * mu[i]);
    }
  }

  // Writes joint log-densities in units of log 2 to score, and raises largest to their maximum over components so far.
  void score(const V* u, int steps, V*, V* score, V* largest) const {
    for (int s = 0; s < steps; s += kUnrolled) {
      V square[kUnrolled] = {};
      for (int i = 0; i < features; ++i)
        for (int t = 0; t < kUnrolled; ++t) {
          const V y = y_of(u, i, s + t);
          square[t] += y * y;
        }
      for (int t = 0; t < kUnrolled; ++t) {
        score[s + t] = peak - Real(0.5 * kLog2e) * square[t];
        largest[s + t] = larger(largest[s + t], score[s + t]);
      }
    }
  }

  const V* whitened(const V*, int, V* white) const { return white; }  // nothing is stored there

  // sums += sum r [1, y, s(y)], where r(s) are the responsibilities, or other weights, of the points of step s
  template <class Weight>
  void add(const V* u, const V*, int steps, Weight r, V* sums) const {
    V mass = {}, square = {};  // square: sum of r |y|^2
    for (int s = 0; s < steps; ++s) mass += r(s);
    sums[0] += mass;
    for (int i = 0; i < features; ++i) {
      V first = {}, second = {};
      for (int s = 0; s < steps; ++s) {
        const V y = y_of(u, i, s), weighted = r(s) * y;
        first += weighted;
        second += weighted * y;
      }
      sums[1 + i] += first;
      if (kDiagonal) sums[1 + features + i] += second;
      square += second;
    }
    if (!kDiagonal) sums[1 + features] += square;
  }

  // Stores the gradient in the sums of y in the form that slope and pull read.
  void store_gradient(const double* gradient, Real* result) const {
    std::copy(gradient, gradient + num_sums(features), result);
  }

  void whiten_sums(double*) const {}  // add computes the sums of whitened points

  // slope = gradient . [1, y, s(y)]
  void slope(const V* u, const V*, int steps, const Real* gradient, V* slope) const {
    std::fill(slope, slope + steps, V{} + gradient[0]);
    for (int i = 0; i < features; ++i) {
      const Real second = gradient[square_of(i, features)];
      for (int s = 0; s < steps; ++s) {
        const V y = y_of(u, i, s);
        slope[s] += y * (gradient[1 + i] + second * y);
      }
    }
  }

  // grad_u += W (r d(gradient . [1, y, s(y)]) / dy - grad_score y), where grad_score is the derivative of the loss in
  // the log-density
  void pull(const V* u, const V*, int steps, const Real* gradient, const V* r, const V* grad_score, V* grad_u) const {
    for (int i = 0; i < features; ++i) {
      const Real first = gradient[1 + i], second = 2 * gradient[square_of(i, features)];
      for (int s = 0; s < steps; ++s) {
        const V y = y_of(u, i, s);
        grad_u[i * kSteps + s] += inverse[i] * (r[s] * (first + second * y) - grad_score[s] * y);
      }
    }
  }

 private:
  V y_of(const V* u, int i, int s) const { return inverse[i] * u[i * kSteps + s] + offset[i]; }
};

}  // namespace
