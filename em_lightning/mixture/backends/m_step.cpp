// The M-step of Gaussian mixtures without a prior, and its gradient.
//
// For sums of one component, mass N, first f = sum_n r_n z_n and second s, with e a small constant added to the mass:
//   mean m = f / (N + e),  covariance C = (s - N m m^T) / (N + e) + floor I,  weight (N + e) / sum over components.
// Full covariances have sums s of the products z_i z_j for i <= j, diagonal ones those of the squares. Spherical ones
// have the sum of |z|^2, and their variance is the average over features. Variances of diagonal and spherical ones are
// at least the smallest that is distinguishable from round-off.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

enum Kind : int64_t { kFull, kDiagonal, kSpherical };

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr double kAdded = 10.0 * kEpsilon;  // to each mass, as in scikit-learn

struct Problem {
  int64_t sets, components, features, kind;
  const double *mass, *first, *second, *floor;
  double *log_weights, *means, *covariances;
  // Used by the backward pass only.
  const double *grad_log_weights, *grad_means, *grad_covariances;
  double *grad_mass, *grad_first, *grad_second;

  int64_t num_second() const {  // numbers per component
    return kind == kFull ? features * (features + 1) / 2 : kind == kDiagonal ? features : 1;
  }
  int64_t covariance_size() const { return kind == kFull ? features * features : num_second(); }
};

double average_square(const double* mean, int64_t features) {
  double total = 0.0;
  for (int64_t i = 0; i < features; ++i) total += mean[i] * mean[i];
  return total / features;
}

// The smallest variance distinguishable from round-off, as smallest_pivots in covariance/cholesky.py.
double smallest_variance(double variance, double mean_square) {
  return std::max(4.0 * kEpsilon * (std::abs(variance) + mean_square), std::pow(kEpsilon, 4));
}

// Estimates the mean and covariance of one component. With kSize > 0 the number of features is known to the compiler.
template <int kSize>
void estimate_full(const Problem& p, int64_t component, double floor) {
  const int64_t D = kSize > 0 ? kSize : p.features;
  const double N = p.mass[component], share = 1.0 / (N + kAdded);
  const double *first = p.first + component * D, *second = p.second + component * (D * (D + 1) / 2);
  double *mean = p.means + component * D, *covariance = p.covariances + component * D * D;
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

void estimate_variances(const Problem& p, int64_t component, double floor) {
  const int64_t D = p.features;
  const double N = p.mass[component], mass = N + kAdded;
  const double *first = p.first + component * D, *second = p.second + component * p.num_second();
  double *mean = p.means + component * D, *variances = p.covariances + component * p.num_second();
  for (int64_t i = 0; i < D; ++i) mean[i] = first[i] / mass;
  for (int64_t i = 0; i < p.num_second(); ++i) {
    const double square = p.kind == kDiagonal ? mean[i] * mean[i] : average_square(mean, D);
    const double variance = (second[i] / (p.kind == kDiagonal ? 1 : D) - N * square) / mass;
    const double least = smallest_variance(variance, square);
    variances[i] = variance + floor < least ? least : variance + floor;
  }
}

void estimate(const Problem& p, int64_t component, double floor) {
  if (p.kind != kFull) return estimate_variances(p, component, floor);
  switch (p.features) {
    case 2: return estimate_full<2>(p, component, floor);
    case 3: return estimate_full<3>(p, component, floor);
    default: return estimate_full<0>(p, component, floor);
  }
}

// Writes the gradients in the sums of a component. A log-weight is log(mass_k) - log(sum_j mass_j), so that each mass
// has the gradient grad_log_weight_k / mass_k - sum_j grad_log_weight_j / sum_j mass_j, of which the last term is
// ``common``.
void differentiate(const Problem& p, int64_t component, double floor, double common) {
  const int64_t D = p.features, S = p.num_second();
  const double N = p.mass[component], mass = N + kAdded;
  const double *mean = p.means + component * D, *covariance = p.covariances + component * p.covariance_size();
  const double *second = p.second + component * S, *grad_mean = p.grad_means + component * D;
  const double* grad = p.grad_covariances + component * p.covariance_size();
  double *grad_first = p.grad_first + component * D, *grad_second = p.grad_second + component * S;
  double grad_mass = p.grad_log_weights[component] / mass - common;
  std::copy(grad_mean, grad_mean + D, grad_first);  // until the last loop, grad_first holds the gradient in the mean
  if (p.kind == kFull) {
    for (int64_t i = 0; i < D; ++i)
      for (int64_t j = i; j < D; ++j) {
        // The gradient in the scatter s_ij - N m_i m_j, through the entries (i, j) and (j, i) of the covariance.
        const double of_scatter = (i == j ? grad[i * D + i] : grad[i * D + j] + grad[j * D + i]) / mass;
        const double without_floor = covariance[i * D + j] - (i == j ? floor : 0.0);
        *grad_second++ = of_scatter;
        grad_mass -= of_scatter * (mean[i] * mean[j] + without_floor);
        grad_first[i] -= of_scatter * N * mean[j];
        grad_first[j] -= of_scatter * N * mean[i];
      }
  } else {
    const int64_t shared = p.kind == kDiagonal ? 1 : D;  // features that share a variance
    for (int64_t i = 0; i < S; ++i) {
      const double square = p.kind == kDiagonal ? mean[i] * mean[i] : average_square(mean, D);
      const double variance = (second[i] / shared - N * square) / mass;
      const bool raised = variance + floor < smallest_variance(variance, square);
      const double of_scatter = raised ? 0.0 : grad[i] / mass;  // of the average over the features that share it
      grad_second[i] = of_scatter / shared;
      grad_mass -= of_scatter * (square + variance);
      for (int64_t j = i; j < i + shared; ++j) grad_first[j] -= 2.0 * of_scatter * N * mean[j] / shared;
    }
  }
  for (int64_t i = 0; i < D; ++i) {  // mean = first / mass
    grad_first[i] /= mass;
    grad_mass -= grad_first[i] * mean[i];
  }
  p.grad_mass[component] = grad_mass;
}

}  // namespace

// Writes log-weights (B, K), means (B, K, D) and covariances.
extern "C" void em_lightning_m_step(const Problem* problem) {
  const Problem& p = *problem;
  for (int64_t set = 0; set < p.sets; ++set) {
    const int64_t first = set * p.components, last = first + p.components;
    double total = 0.0;
    for (int64_t k = first; k < last; ++k) {
      total += p.mass[k] + kAdded;
      estimate(p, k, p.floor[set]);
    }
    for (int64_t k = first; k < last; ++k) p.log_weights[k] = std::log((p.mass[k] + kAdded) / total);
  }
}

// Writes the gradients of mass, first and second, given those of the results.
extern "C" void em_lightning_m_step_gradient(const Problem* problem) {
  const Problem& p = *problem;
  for (int64_t set = 0; set < p.sets; ++set) {
    const int64_t first = set * p.components, last = first + p.components;
    double total = 0.0, sum_of_grads = 0.0;
    for (int64_t k = first; k < last; ++k) {
      total += p.mass[k] + kAdded;
      sum_of_grads += p.grad_log_weights[k];
    }
    for (int64_t k = first; k < last; ++k) differentiate(p, k, p.floor[set], sum_of_grads / total);
  }
}
