// Cholesky factors of many small matrices, their inverses, and the gradient of both.

#include <algorithm>
#include <cmath>
#include <cstdint>
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

// Bound of entries of L relative to their largest possible size; above 1, so that round-off changes no valid entry.
constexpr double kBound = 1.001;

// Writes the factors L and their inverses W (lower triangles) of the lower triangles of matrices (count, size, size).
// Pivots, the squared diagonal entries of L, are at least ``pivots`` (count, size). The squares of a row of L add up to
// the diagonal entry of the matrix, unless rounding made it indefinite. Therefore entries are bounded by the root of
// the diagonal entry. kSize is the size where it is known to the compiler, otherwise 0.
template <int kSize>
void factorize(const Problem& p) {
  const int64_t size = kSize > 0 ? kSize : p.size;
  for (int64_t n = 0; n < p.entries / (size * size); ++n) {
    const double *a = p.matrix + n * size * size, *least = p.pivots + n * size;
    double *l = p.scale + n * size * size, *w = p.inverse + n * size * size;
    for (int64_t i = 0; i < size; ++i) {
      const double largest = kBound * std::sqrt(std::max(a[i * size + i], least[i]));  // of entries of row i
      double pivot = a[i * size + i];
      for (int64_t j = 0; j < i; ++j) {
        double entry = a[i * size + j];
        for (int64_t q = 0; q < j; ++q) entry -= l[i * size + q] * l[j * size + q];
        entry = std::min(std::max(entry * w[j * size + j], -largest), largest);
        l[i * size + j] = entry;
        pivot -= entry * entry;
      }
      const double root = std::sqrt(pivot < least[i] ? least[i] : pivot), reciprocal = 1.0 / root;
      l[i * size + i] = root;
      w[i * size + i] = reciprocal;
      for (int64_t j = 0; j < i; ++j) {  // row i of L W = I
        double entry = 0.0;
        for (int64_t q = j; q < i; ++q) entry += l[i * size + q] * w[q * size + j];
        w[i * size + j] = -entry * reciprocal;
      }
      std::fill(l + i * size + i + 1, l + (i + 1) * size, 0.0);
      std::fill(w + i * size + i + 1, w + (i + 1) * size, 0.0);
    }
  }
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
      const double largest = kBound * std::sqrt(std::max(a[i * size + i], least[i]));
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
