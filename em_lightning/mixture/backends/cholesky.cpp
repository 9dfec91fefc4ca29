// Cholesky factors of many small matrices, their inverses, and the gradient of both.

#include "gaussian.h"

#include <vector>

namespace {

// ``entries`` is the number of entries of all matrices (..., size, size) together. The last three fields are those of
// the backward pass.
struct Problem {
  int64_t entries, size;
  const double *matrix, *pivots;  // pivots are the smallest allowed ones
  double *scale, *inverse;        // scale is L, inverse is W
  const double *grad_scale, *grad_inverse;
  double* grad_matrix;
};

template <int kSize>
void factorize(const Problem& p) {
  const int64_t size = p.size, area = size * size;
  for (int64_t n = 0; n < p.entries / area; ++n)
    gaussian::factorize<kSize>(p.matrix + n * area, p.pivots + n * size, size, p.scale + n * area,
                               p.inverse + n * area);
}

}  // namespace

extern "C" void em_lightning_cholesky(const Problem* problem) {
  switch (problem->size) {
    case 1: return factorize<1>(*problem);
    case 2: return factorize<2>(*problem);
    case 3: return factorize<3>(*problem);
    case 4: return factorize<4>(*problem);
    default: return factorize<0>(*problem);
  }
}

// Writes the gradient of the loss in the symmetric matrices, given its gradients in L and W: factorize in reverse
// order. Entries of L that were bounded, and pivots that were raised, are constants.
extern "C" void em_lightning_cholesky_gradient(const Problem* problem) {
  const Problem& p = *problem;
  const int64_t size = p.size;
  std::vector<double> g(size * size), product(size * size);
  for (int64_t n = 0; n < p.entries / (size * size); ++n) {
    const int64_t place = n * size * size;
    const double *a = p.matrix + place, *least = p.pivots + n * size, *l = p.scale + place, *w = p.inverse + place;
    const double *of_l = p.grad_scale + place, *of_w = p.grad_inverse + place;
    double* result = p.grad_matrix + place;
    // A gradient G in W is the gradient -W^T G W^T in L. product is W^T G, and g is the gradient in L.
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j) {
        product[i * size + j] = 0.0;
        for (int64_t q = i; q < size; ++q)
          if (j <= q) product[i * size + j] += w[q * size + i] * of_w[q * size + j];
      }
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        double entry = of_l[i * size + j];
        for (int64_t q = 0; q <= j; ++q) entry -= product[i * size + q] * w[j * size + q];
        g[i * size + j] = entry;
      }
    std::fill(result, result + size * size, 0.0);
    // From the last entry to the first; each adds to g its share of the gradients in the entries that it depends on.
    for (int64_t i = size - 1; i >= 0; --i) {
      const double largest = gaussian::kBound * std::sqrt(std::max(a[i * size + i], least[i]));
      const double root = l[i * size + i];
      const double of_pivot = root > std::sqrt(least[i]) ? 0.5 * g[i * size + i] / root : 0.0;
      result[i * size + i] = of_pivot;
      for (int64_t j = i - 1; j >= 0; --j) {
        const double entry = l[i * size + j];
        if (!(std::abs(entry) < largest)) continue;
        const double of_entry = (g[i * size + j] - 2.0 * of_pivot * entry) * w[j * size + j];
        result[i * size + j] = result[j * size + i] = 0.5 * of_entry;
        g[j * size + j] -= of_entry * entry;
        for (int64_t q = 0; q < j; ++q) {
          g[i * size + q] -= of_entry * l[j * size + q];
          g[j * size + q] -= of_entry * l[i * size + q];
        }
      }
    }
  }
}
