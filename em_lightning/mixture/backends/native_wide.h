// Full covariances of more than 8 features: products of tiles of 4 rows and 2 vectors of points, in registers.

namespace {

constexpr int kRows = (D + 3) / 4 * 4;  // rows of whitened points and of matrices; those beyond D are zero
constexpr int kUnrolled = 2;            // steps are a multiple of it
constexpr int kMatrix = kRows * kRows;
inline int gradient_size(int64_t) { return 1 + D + 2 * kMatrix; }

// Stores G, the lower triangle of the gradient of pairs, and G + G^T.
inline void store_gradient(const double* own, int64_t, Real* result) {
  std::copy(own, own + 1 + D, result);
  Real *lower_half = result + 1 + D, *both = lower_half + kMatrix;
  std::fill(lower_half, lower_half + 2 * kMatrix, Real(0));
  for (int i = 0; i < D; ++i)
    for (int j = 0; j <= i; ++j) {
      lower_half[i * kRows + j] = both[i * kRows + j] = both[j * kRows + i] = Real(own[lower(i, j)]);
      if (i == j) both[i * kRows + i] *= 2;
    }
}

// Calls use(row, s, sum) with sum_j matrix[row][j] in[j][s] for all rows and steps; j is at most the last row of a tile
// of a lower triangle.
template <bool kTriangle, class Use>
inline void multiply(const Real* matrix, const V* in, int steps, Use use) {
  for (int row = 0; row < kRows; row += 4) {
    const int columns = kTriangle ? std::min(row + 4, D) : D;
    for (int s = 0; s < steps; s += 2) {
      V sums[4][2] = {};
      for (int j = 0; j < columns; ++j) {
        const V left = in[j * kSteps + s], right = in[j * kSteps + s + 1];
        for (int r = 0; r < 4; ++r) {
          const Real entry = matrix[(row + r) * kRows + j];
          sums[r][0] += entry * left;
          sums[r][1] += entry * right;
        }
      }
      for (int r = 0; r < 4; ++r) {
        use(row + r, s, sums[r][0]);
        use(row + r, s + 1, sums[r][1]);
      }
    }
  }
}

struct Component {
  Real peak, mean[D], offset[kRows] = {}, inverse[kMatrix] = {}, transposed[kMatrix] = {};

  Component(const double* w, const double* mu, double top, int64_t) : peak(top * kLog2e) {
    for (int i = 0; i < D; ++i) mean[i] = Real(mu[i]);
    for (int i = 0; i < D; ++i) {
      double rest = 0.0;  // rounding error of the mean, after whitening
      for (int j = 0; j <= i; ++j) {
        rest += w[i * D + j] * (double(mean[j]) - mu[j]);
        inverse[i * kRows + j] = transposed[j * kRows + i] = Real(w[i * D + j]);
      }
      offset[i] = Real(rest);
    }
  }

  void score(const V* u, int steps, V* white, V* score) const {
    V difference[D * kSteps], square[kSteps] = {};
    for (int i = 0; i < D; ++i)
      for (int s = 0; s < steps; ++s) difference[i * kSteps + s] = u[i * kSteps + s] - mean[i];
    multiply<true>(inverse, difference, steps, [&](int i, int s, V sum) {
      const V y = sum + offset[i];
      white[i * kSteps + s] = y;
      square[s] += y * y;
    });
    for (int s = 0; s < steps; ++s) score[s] = peak - Real(0.5 * kLog2e) * square[s];
  }

  // sums += sum r [1, y, y_i y_j]
  void add(const V*, const V* white, int steps, const V* r, V* sums) const {
    V weighted[kRows * kSteps];
    for (int s = 0; s < steps; ++s) sums[0] += r[s];
    for (int i = 0; i < kRows; ++i) {
      V first = {};
      for (int s = 0; s < steps; ++s) first += weighted[i * kSteps + s] = r[s] * white[i * kSteps + s];
      if (i < D) sums[1 + i] += first;
    }
    for (int row = 0; row < kRows; row += 4)
      for (int column = 0; column < row + 4; column += 2) {
        V own[4][2] = {};
        for (int s = 0; s < steps; ++s)
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 2; ++j)
              own[i][j] += weighted[(row + i) * kSteps + s] * white[(column + j) * kSteps + s];
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 2; ++j)
            if (row + i < D && column + j <= row + i) sums[lower(row + i, column + j)] += own[i][j];
      }
  }

  // slope = gradient . [1, y, y_i y_j]
  void slope(const V*, const V* white, int steps, const Real* gradient, V* slope) const {
    std::fill(slope, slope + steps, V{} + gradient[0]);
    multiply<true>(gradient + 1 + D, white, steps, [&](int i, int s, V sum) {
      if (i < D) slope[s] += (sum + gradient[1 + i]) * white[i * kSteps + s];
    });
  }

  // grad_u += W^T (r d(gradient . [1, y, y_i y_j]) / dy - slope y)
  void pull(const V*, const V* white, int steps, const Real* gradient, const V* r, const V* slope, V* grad_u) const {
    V outer[kRows * kSteps];
    multiply<false>(gradient + 1 + D + kMatrix, white, steps, [&](int i, int s, V sum) {
      const Real first = i < D ? gradient[1 + i] : Real(0);
      outer[i * kSteps + s] = r[s] * (sum + first) - slope[s] * white[i * kSteps + s];
    });
    multiply<false>(transposed, outer, steps, [&](int i, int s, V sum) {
      if (i < D) grad_u[i * kSteps + s] += sum;
    });
  }
};

}  // namespace
