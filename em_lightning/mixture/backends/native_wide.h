// Full covariances of more than 6 features: products of tiles of 4 rows and 2 vectors of points, whose 8 sums stay in
// registers. Included by native_full.h, which explains u, W, y, mu, lower() and the unnamed arguments.

// Keeps a value in a register, where the compiler would load it again for each use.
#if defined(__x86_64__)
#define KEEP(value) asm("" : "+x"(value))
#else
#define KEEP(value)
#endif

namespace {

constexpr int kRows = (D + 3) / 4 * 4;  // rows of whitened points and of matrices; those beyond D are zero
constexpr int kUnrolled = 2;            // vectors per tile; steps are a multiple of it
constexpr int kGrain = 1;               // points that are skipped at a time, if their responsibilities are negligible
constexpr int kMatrix = kRows * kRows;  // numbers of a matrix
// Steps that are whitened at a time, so that their differences, at most 64 KiB (D = 64 with AVX-512), stay in the first
// or second cache level. Chosen, not measured.
constexpr int kChunk = 16;
inline int gradient_size(int64_t) { return 1 + D + 2 * kMatrix; }  // see store_gradient

// Calls use(row, s, sum) with sum_j matrix[row][j] in[j][s] for all rows and steps. With kTriangle the matrix is a
// lower triangle: columns beyond the last row of a tile are zero and skipped. Rows of ``in`` are kStride vectors apart.
template <bool kTriangle, int kStride = kSteps, class Use>
inline void multiply(const Real* matrix, const V* in, int steps, Use use) {
  for (int row = 0; row < kRows; row += 4) {
    const int columns = kTriangle ? std::min(row + 4, D) : D;
    for (int s = 0; s < steps; s += kUnrolled) {
      V sums[4][kUnrolled] = {};
#pragma GCC unroll 4
      for (int j = 0; j < columns; ++j) {
        V own[kUnrolled];
        for (int t = 0; t < kUnrolled; ++t) {
          own[t] = in[j * kStride + s + t];
          KEEP(own[t]);
        }
        for (int r = 0; r < 4; ++r)
          for (int t = 0; t < kUnrolled; ++t) sums[r][t] += matrix[(row + r) * kRows + j] * own[t];
      }
      for (int r = 0; r < 4; ++r)
        for (int t = 0; t < kUnrolled; ++t) use(row + r, s + t, sums[r][t]);
    }
  }
}

struct Component {
  // y = W (u - mean) + offset, with the mean rounded to Real; inverse is W, transposed W^T, the peak in units of log 2.
  Real peak, mean[D], offset[kRows] = {}, inverse[kMatrix] = {}, transposed[kMatrix] = {};

  Component(const double* w, const double* mu, double peak_in_nats, int64_t) : peak(peak_in_nats * kLog2e) {
    for (int i = 0; i < D; ++i) mean[i] = Real(mu[i]);
    for (int i = 0; i < D; ++i) {
      double rest = 0.0;  // rounding error of the mean, after whitening
      for (int j = 0; j <= i; ++j) {
        rest += w[i * D + j] * (rounded(mu[j]) - mu[j]);
        inverse[i * kRows + j] = transposed[j * kRows + i] = Real(w[i * D + j]);
      }
      offset[i] = Real(rest);
    }
  }

  // Writes joint log-densities in units of log 2 to score, and raises largest to their maximum over components so far.
  void score(const V* u, int steps, V*, V* score, V* largest) const {
    for (int s = 0; s < steps; s += kUnrolled) {
      V difference[D][kUnrolled], square[kUnrolled] = {};
      for (int i = 0; i < D; ++i)
        for (int t = 0; t < kUnrolled; ++t) difference[i][t] = u[i * kSteps + s + t] - mean[i];
      for (int row = 0; row < kRows; row += 4) {
        V y[4][kUnrolled];
        for (int r = 0; r < 4; ++r)
          for (int t = 0; t < kUnrolled; ++t) y[r][t] = lanes(offset[row + r]);
        const int columns = std::min(row + 4, D);
#pragma GCC unroll 4
        for (int j = 0; j < columns; ++j) {
          V own[kUnrolled];
          for (int t = 0; t < kUnrolled; ++t) {
            own[t] = difference[j][t];
            KEEP(own[t]);
          }
          for (int r = 0; r < 4; ++r)
            for (int t = 0; t < kUnrolled; ++t) y[r][t] += inverse[(row + r) * kRows + j] * own[t];
        }
        for (int r = 0; r < 4; ++r)
          for (int t = 0; t < kUnrolled; ++t) square[t] += y[r][t] * y[r][t];
      }
      for (int t = 0; t < kUnrolled; ++t) {
        score[s + t] = peak - Real(0.5 * kLog2e) * square[t];
        largest[s + t] = larger(largest[s + t], score[s + t]);
      }
    }
  }

  // Whitens the chosen points again: score does not store its results, which for all components would exceed the cache.
  const V* whitened(const V* u, int steps, V* white) const {
    whiten(u, steps, [&](int i, int s, V y) { white[i * kSteps + s] = y; });
    return white;
  }

  // sums += sum r [1, y, y_i y_j], where r(s) are the responsibilities, or other weights, of the points of step s
  template <class Weight>
  void add(const V*, const V* white, int steps, Weight r, V* sums) const {
    V weighted[kRows * kSteps];
    V mass = {};
    for (int s = 0; s < steps; ++s) mass += r(s);
    sums[0] += mass;
    for (int i = 0; i < kRows; ++i) {
      V first = {};
      for (int s = 0; s < steps; ++s) first += weighted[i * kSteps + s] = r(s) * white[i * kSteps + s];
      if (i < D) sums[1 + i] += first;
    }
    for (int row = 0; row < kRows; row += 4)
      for (int column = 0; column < row + 4; column += 2) {
        V tile[4][2] = {};
        for (int s = 0; s < steps; ++s) {
          V left = white[column * kSteps + s], right = white[(column + 1) * kSteps + s];
          KEEP(left);
          KEEP(right);
          for (int i = 0; i < 4; ++i) {
            V outer = weighted[(row + i) * kSteps + s];
            KEEP(outer);
            tile[i][0] += outer * left;
            tile[i][1] += outer * right;
          }
        }
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 2; ++j)
            if (row + i < D && column + j <= row + i) sums[lower(row + i, column + j)] += tile[i][j];
      }
  }

  // Stores the gradient in the sums of y as slope and pull read it: those in the sums of 1 and y, the lower triangle G
  // of those in the sums of y_i y_j, and G + G^T.
  void store_gradient(const double* gradient, Real* result) const {
    std::copy(gradient, gradient + 1 + D, result);
    Real *lower_half = result + 1 + D, *both = lower_half + kMatrix;
    std::fill(lower_half, lower_half + 2 * kMatrix, Real(0));
    for (int i = 0; i < D; ++i)
      for (int j = 0; j <= i; ++j) {
        lower_half[i * kRows + j] = both[i * kRows + j] = both[j * kRows + i] = Real(gradient[lower(i, j)]);
        if (i == j) both[i * kRows + i] *= 2;
      }
  }

  void whiten_sums(double*) const {}  // add computes the sums of whitened points

  // slope = gradient . [1, y, y_i y_j], with the gradient that store_gradient stored
  void slope(const V*, const V* white, int steps, const Real* gradient, V* slope) const {
    std::fill(slope, slope + steps, V{} + gradient[0]);
    multiply<true>(gradient + 1 + D, white, steps, [&](int i, int s, V sum) {
      if (i < D) slope[s] += (sum + gradient[1 + i]) * white[i * kSteps + s];
    });
  }

  // grad_u += W^T (r d(gradient . [1, y, y_i y_j]) / dy - grad_score y), where grad_score is the derivative of the loss
  // in the log-density
  void pull(const V*, const V* white, int steps, const Real* gradient, const V* r, const V* grad_score,
            V* grad_u) const {
    V outer[kRows * kSteps];
    multiply<false>(gradient + 1 + D + kMatrix, white, steps, [&](int i, int s, V sum) {
      const V slope_y = sum + (i < D ? gradient[1 + i] : Real(0));
      outer[i * kSteps + s] = r[s] * slope_y - grad_score[s] * white[i * kSteps + s];
    });
    multiply<false>(transposed, outer, steps, [&](int i, int s, V sum) {
      if (i < D) grad_u[i * kSteps + s] += sum;
    });
  }

 private:
  template <class Use>
  void whiten(const V* u, int steps, Use use) const {
    V difference[D * kChunk];
    for (int first = 0; first < steps; first += kChunk) {
      const int count = std::min(kChunk, steps - first);
      for (int i = 0; i < D; ++i)
        for (int s = 0; s < count; ++s) difference[i * kChunk + s] = u[i * kSteps + first + s] - mean[i];
      multiply<true, kChunk>(inverse, difference, count, [&](int i, int s, V sum) {
        use(i, first + s, sum + offset[i]);
      });
    }
  }
};

}  // namespace
