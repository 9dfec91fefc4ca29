// The M-step of Gaussian mixtures without a prior, and its gradient; see gaussian.h.

#include "gaussian.h"

namespace {

using gaussian::kAdded;

struct Problem {
  int64_t sets, components, features, kind;
  const double *mass, *first, *second, *floor;
  double *log_weights, *means, *covariances;
  // Used by the backward pass only.
  const double *grad_log_weights, *grad_means, *grad_covariances;
  double *grad_mass, *grad_first, *grad_second;
};

// Writes the gradients in the sums of a component. A log-weight is log(mass_k) - log(sum_j mass_j), so that each mass
// has the gradient grad_log_weight_k / mass_k - sum_j grad_log_weight_j / sum_j mass_j, of which the last term is
// ``common``.
void differentiate(const Problem& p, int64_t component, double floor, double common) {
  const int64_t D = p.features, S = gaussian::num_second(p.kind, D), size = gaussian::covariance_size(p.kind, D);
  const double N = p.mass[component], mass = N + kAdded;
  const double *mean = p.means + component * D, *covariance = p.covariances + component * size;
  const double *second = p.second + component * S, *grad_mean = p.grad_means + component * D;
  const double* grad = p.grad_covariances + component * size;
  double *grad_first = p.grad_first + component * D, *grad_second = p.grad_second + component * S;
  double grad_mass = p.grad_log_weights[component] / mass - common;
  std::copy(grad_mean, grad_mean + D, grad_first);  // until the last loop, grad_first holds the gradient in the mean
  if (p.kind == gaussian::kFull) {
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
    const int64_t shared = p.kind == gaussian::kDiagonal ? 1 : D;  // features that share a variance
    for (int64_t i = 0; i < S; ++i) {
      const double square = p.kind == gaussian::kDiagonal ? mean[i] * mean[i] : gaussian::average_square(mean, D);
      const double variance = (second[i] / shared - N * square) / mass;
      const bool raised = variance + floor < gaussian::smallest_variance(std::abs(variance) + square);
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
  const int64_t K = p.components, D = p.features, S = gaussian::num_second(p.kind, D);
  const int64_t size = gaussian::covariance_size(p.kind, D);
  for (int64_t k = 0; k < p.sets * K; ++k)
    gaussian::estimate(p.kind, D, p.mass[k], p.first + k * D, p.second + k * S, p.floor[k / K], p.means + k * D,
                       p.covariances + k * size);
  for (int64_t k = 0; k < p.sets * K; k += K) gaussian::estimate_weights(K, p.mass + k, 1, p.log_weights + k);
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
