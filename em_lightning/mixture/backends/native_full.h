// Full covariances: sums of whitened points, their change of coordinates, and its gradients.
//
// A Component whitens points, y = W (u - mean), and works on sums of [1, y, y_i y_j for j <= i]. A block u of points
// holds kSteps vectors per feature. ``scale`` is L = W^-1, ``mu`` the mean; L and W are lower triangles, stored as D x
// D numbers. Unnamed arguments are the number of features in native_diagonal.h, which is the constant D here.

#include "gaussian.h"
#include "native_vectors.h"

// Unrolls loops over few features completely.
#if FEATURES <= 6
#define UNROLL _Pragma("GCC unroll 6")
#else
#define UNROLL
#endif

namespace {

constexpr int D = FEATURES;
using Matrix = double[D][D];
inline int num_sums(int64_t) { return 1 + D + D * (D + 1) / 2; }
inline int factor_size(int64_t) { return D * D; }
// Places in the sums: lower, of y_i y_j (j <= i), and upper, of z_i z_j (i <= j).
inline int lower(int i, int j) { return 1 + D + i * (i + 1) / 2 + j; }
inline int upper(int i, int j) { return 1 + D + i * D - i * (i - 1) / 2 + j - i; }

// Writes L and W of a covariance, and returns log det W.
inline double factorize_covariance(const double* covariance, const double* mu, int64_t, double* l, double* w) {
  double least[D], log_det = 0.0, product = 1.0;
  for (int i = 0; i < D; ++i) least[i] = gaussian::smallest_variance(covariance[i * D + i] + mu[i] * mu[i]);
  gaussian::factorize<D <= 6 ? D : 0>(covariance, least, D, l, w);  // longer loops are not unrolled
  for (int i = 0; i < D; ++i) product *= w[i * D + i];
  if (D <= 6 && std::isnormal(product)) return std::log(product);  // one logarithm, as each takes as long as a row of W
  for (int i = 0; i < D; ++i) log_det += std::log(w[i * D + i]);
  return log_det;
}

// Converts sums of [1, y, s(y)] to sums of [1, z, s(z)], z = mu + L y.
inline void unwhiten(const double* sums, const double* scale, const double* mu, int64_t, double* result) {
  double shift[D] = {};  // L times the sum of y
  Matrix product;        // L times the sum of y y^T
  UNROLL for (int i = 0; i < D; ++i) {
    UNROLL for (int j = 0; j <= i; ++j) shift[i] += scale[i * D + j] * sums[1 + j];
    UNROLL for (int b = 0; b < D; ++b) {
      double total = 0.0;
      UNROLL for (int a = 0; a <= i; ++a) total += scale[i * D + a] * sums[lower(std::max(a, b), std::min(a, b))];
      product[i][b] = total;
    }
  }
  result[0] = sums[0];
  UNROLL for (int i = 0; i < D; ++i) {
    result[1 + i] = mu[i] * sums[0] + shift[i];
    UNROLL for (int j = i; j < D; ++j) {
      double total = mu[j] * result[1 + i] + mu[i] * shift[j];
      UNROLL for (int b = 0; b <= j; ++b) total += product[i][b] * scale[j * D + b];
      result[upper(i, j)] = total;
    }
  }
}

// The transpose of unwhiten: converts the gradient in the sums of z to the gradient in the sums of y.
inline void whiten_gradient(const double* grads, const double* scale, const double* mu, int64_t, double* result) {
  double linear[D];  // the gradient in the sum of L y
  Matrix product;    // L^T G, with the upper triangle G of gradients
  std::fill(result, result + num_sums(D), 0.0);
  result[0] = grads[0];
  for (int i = 0; i < D; ++i) linear[i] = grads[1 + i];
  for (int i = 0; i < D; ++i) {
    result[0] += mu[i] * grads[1 + i];
    for (int j = i; j < D; ++j) {
      const double pair = grads[upper(i, j)];
      result[0] += pair * mu[i] * mu[j];
      linear[i] += pair * mu[j];
      linear[j] += pair * mu[i];
    }
  }
  for (int a = 0; a < D; ++a)
    for (int j = 0; j < D; ++j) {
      product[a][j] = 0.0;
      for (int i = a; i <= j; ++i) product[a][j] += scale[i * D + a] * grads[upper(i, j)];
    }
  for (int j = 0; j < D; ++j)
    for (int b = 0; b <= j; ++b) {
      result[1 + b] += scale[j * D + b] * linear[j];
      for (int a = 0; a <= j; ++a) result[lower(std::max(a, b), std::min(a, b))] += product[a][j] * scale[j * D + b];
    }
}

// The gradients of peak, mean and W from sums of [1, y, s(y)] weighted by the gradient in the joint log-density g_nk.
inline void parameter_gradient(const double* sums, const double* scale, const double* w, int64_t, double* result) {
  std::fill(result, result + 1 + D + D * D, 0.0);
  result[0] = sums[0];
  for (int i = 0; i < D; ++i)
    for (int j = 0; j <= i; ++j) {
      result[1 + j] += w[i * D + j] * sums[1 + i];
      for (int a = 0; a <= j; ++a) result[1 + D + i * D + j] -= sums[lower(i, a)] * scale[j * D + a];
    }
}

}  // namespace

#if FEATURES <= 6
#include "native_small.h"
#else
#include "native_wide.h"
#endif
