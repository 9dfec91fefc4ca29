// Full covariances of at most 6 features: everything about one vector of points is in registers.

namespace {

constexpr bool kKeeps = true;   // whitened points of all components
constexpr int kRows = D;        // rows of whitened points
constexpr int kUnrolled = 1;    // steps are a multiple of it
constexpr int kGrain = 0;       // no points are skipped
inline int gradient_size(int64_t) { return num_sums(D); }
inline void store_gradient(const double* own, int64_t, Real* result) { std::copy(own, own + num_sums(D), result); }

struct Component {
  V peak, mean[D], offset[D], inverse[D][D];  // the same number in all lanes

  Component(const double* w, const double* mu, double top, int64_t) : peak(V{} + Real(top * kLog2e)) {
    for (int i = 0; i < D; ++i) mean[i] = V{} + Real(mu[i]);
    for (int i = 0; i < D; ++i) {
      double rest = 0.0;  // what rounding the mean leaves, so that it costs no precision
      for (int j = 0; j <= i; ++j) rest += w[i * D + j] * (double(mean[j][0]) - mu[j]);
      offset[i] = V{} + Real(rest);
      for (int j = 0; j <= i; ++j) inverse[i][j] = V{} + Real(w[i * D + j]);
    }
  }

  // Keeps whitened points, as loading them is faster than computing them again.
  void score(const V* u, int steps, V* white, V* score) const {
    const Component own = *this;  // a copy, which writing white and score cannot change
    for (int s = 0; s < steps; ++s) {
      V difference[D], square = V{};
      for (int i = 0; i < D; ++i) difference[i] = u[i * kSteps + s] - own.mean[i];
      for (int i = 0; i < D; ++i) {
        V y = own.offset[i];
        for (int j = 0; j <= i; ++j) y += own.inverse[i][j] * difference[j];
        square += y * y;
        white[i * kSteps + s] = y;
      }
      score[s] = own.peak - Real(0.5 * kLog2e) * square;
    }
  }

  const V* whitened(const V*, int, V* white) const { return white; }

  // sums += sum r [1, y, y_i y_j]
  void add(const V*, const V* white, int steps, const V* r, V* sums) const {
    V own[1 + D + D * (D + 1) / 2] = {};
    for (int s = 0; s < steps; ++s) {
      V y[D], weight = r[s];
      for (int i = 0; i < D; ++i) {
        y[i] = white[i * kSteps + s];
      }
      own[0] += weight;
      int pair = 1 + D;
      for (int i = 0; i < D; ++i) {
        const V weighted = weight * y[i];
        own[1 + i] += weighted;
        for (int j = 0; j <= i; ++j) own[pair++] += weighted * y[j];
      }
    }
    for (int i = 0; i < num_sums(D); ++i) sums[i] += own[i];
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

}  // namespace
