// Full covariances of at most 6 features: everything about one vector of points is in registers. Included by
// native_full.h, which explains u, W, y, mu, lower() and the unnamed arguments.
//
// W = diag(w) T, where T has a unit diagonal. A Component computes t = T (u - mean) for the mean rounded to Real. Then
// y_i = w_i (t_i + rest_i), where rest is T times the rounding error of the mean. Sums of [1, t, t_i t_j for j <= i]
// take fewer multiplications and registers than those of y. The log-density in units of log 2 is
// top - sum_i (quadratic_i t_i + linear_i) t_i.

namespace {

constexpr int kRows = 0;      // rows of stored whitened points: none, because loading them would not be faster
constexpr int kUnrolled = 2;  // steps are a multiple of it; native.cpp takes exp2 of two vectors at a time
constexpr int kGrain = 0;     // points that are skipped at a time; 0: none are skipped
// Entries of T below its diagonal; 1 for D = 1, as an array must not be empty.
constexpr int kBelow = D > 1 ? D * (D - 1) / 2 : 1;
inline int below(int i, int j) { return i * (i - 1) / 2 + j; }
inline int gradient_size(int64_t) { return num_sums(D); }

class Component {
 public:
  // w_matrix: W; peak_in_nats: the joint log-density at the mean
  Component(const double* w_matrix, const double* mu, double peak_in_nats, int64_t) : top(peak_in_nats * kLog2e) {
    // Let max be the largest number of Real. Entries of T up to max^0.4 keep t^2 finite for |u - mean| up to max^0.1.
    const double bound = std::pow(double(std::numeric_limits<Real>::max()), 0.4);
    double error[D];  // of the rounded mean
    UNROLL for (int i = 0; i < D; ++i) {
      const double rounded_mean = rounded(mu[i]);
      mean[i] = Real(rounded_mean);
      error[i] = rounded_mean - mu[i];
    }
    UNROLL for (int i = 0; i < D; ++i) {
      w[i] = w_matrix[i * D + i];
      const double reciprocal = w[i] > 0.0 ? 1.0 / w[i] : 0.0;
      rest[i] = error[i];
      UNROLL for (int j = 0; j < i; ++j) {
        const double entry = w_matrix[i * D + j] * reciprocal;
        shear[below(i, j)] = Real(std::min(std::max(entry, -bound), bound));
        rest[i] += shear[below(i, j)] * error[j];
      }
      const double square = 0.5 * kLog2e * w[i] * w[i];
      quadratic[i] = Real(square);
      linear[i] = Real(2.0 * square * rest[i]);
      top -= square * rest[i] * rest[i];
    }
  }

  // Writes joint log-densities in units of log 2 to scores, and raises largest to their maximum over components so far.
  void score(const V* u, int steps, V*, V* scores, V* largest) const {
    const Shear t_of(*this);
    V linear_lanes[D], quadratic_lanes[D];
    const V highest = lanes(Real(top));
    for (int i = 0; i < D; ++i) linear_lanes[i] = lanes(linear[i]);
    for (int i = 0; i < D; ++i) quadratic_lanes[i] = lanes(quadratic[i]);
    for (int s = 0; s < steps; ++s) {
      V t[D], total = highest;
      t_of(u, s, t);
      for (int i = 0; i < D; ++i) total -= (quadratic_lanes[i] * t[i] + linear_lanes[i]) * t[i];
      scores[s] = total;
      largest[s] = larger(largest[s], total);
    }
  }

  const V* whitened(const V*, int, V*) const { return nullptr; }  // none are stored

  // sums += sum r [1, t, t_i t_j]
  template <class Weight>
  void add(const V* u, const V*, int steps, Weight r, V* sums) const {
    const Shear t_of(*this);
    V local[1 + D + D * (D + 1) / 2] = {};
    for (int s = 0; s < steps; ++s) {
      V t[D];
      const V weight = r(s);
      t_of(u, s, t);
      local[0] += weight;
      int pair = 1 + D;
      for (int i = 0; i < D; ++i) {
        const V weighted = weight * t[i];
        local[1 + i] += weighted;
        for (int j = 0; j <= i; ++j) local[pair++] += weighted * t[j];
      }
    }
    for (int i = 0; i < num_sums(D); ++i) sums[i] += local[i];
  }

  // Converts sums of [1, t, t_i t_j] to sums of [1, y, y_i y_j].
  void whiten_sums(double* sums) const {
    UNROLL for (int i = 0; i < D; ++i)
      UNROLL for (int j = 0; j <= i; ++j) {
        const double shifts = rest[i] * sums[1 + j] + rest[j] * sums[1 + i] + rest[i] * rest[j] * sums[0];
        sums[lower(i, j)] = w[i] * w[j] * (sums[lower(i, j)] + shifts);
      }
    UNROLL for (int i = 0; i < D; ++i) sums[1 + i] = w[i] * (sums[1 + i] + rest[i] * sums[0]);
  }

  // Converts the gradient with respect to the sums of y to that with respect to the sums of t.
  void store_gradient(const double* gradient, Real* result) const {
    double converted[1 + D + D * (D + 1) / 2];
    converted[0] = gradient[0];
    for (int i = 0; i < D; ++i) {
      converted[1 + i] = w[i] * gradient[1 + i];
      converted[0] += rest[i] * converted[1 + i];
    }
    for (int i = 0; i < D; ++i)
      for (int j = 0; j <= i; ++j) {
        const double pair = w[i] * w[j] * gradient[lower(i, j)];
        converted[lower(i, j)] = pair;
        converted[1 + i] += rest[j] * pair;
        converted[1 + j] += rest[i] * pair;
        converted[0] += rest[i] * rest[j] * pair;
      }
    std::copy(converted, converted + num_sums(D), result);
  }

  // slopes = gradient . [1, t, t_i t_j]
  void slope(const V* u, const V*, int steps, const Real* gradient, V* slopes) const {
    const Shear t_of(*this);
    for (int s = 0; s < steps; ++s) {
      V t[D], total = lanes(gradient[0]);
      t_of(u, s, t);
      int pair = 1 + D;
      for (int i = 0; i < D; ++i) {
        V inner = lanes(gradient[1 + i]);
        for (int j = 0; j <= i; ++j) inner += gradient[pair++] * t[j];
        total += inner * t[i];
      }
      slopes[s] = total;
    }
  }

  // grad_u += T^T (r d(gradient . [1, t, t_i t_j]) / dt + grad_score d(log-density) / dt), where grad_score is the
  // derivative of the loss with respect to the log-density; linear and quadratic are in units of log 2
  void pull(const V* u, const V*, int steps, const Real* gradient, const V* r, const V* grad_score, V* grad_u) const {
    const Shear t_of(*this);
    for (int s = 0; s < steps; ++s) {
      V t[D], inner[D];
      t_of(u, s, t);
      for (int i = 0; i < D; ++i) inner[i] = lanes(gradient[1 + i]);
      int pair = 1 + D;
      for (int i = 0; i < D; ++i)
        for (int j = 0; j <= i; ++j, ++pair) {
          inner[i] += gradient[pair] * t[j];
          inner[j] += gradient[pair] * t[i];
        }
      const V in_nats = Real(kLn2) * grad_score[s];
      for (int i = 0; i < D; ++i) {
        const V outer = r[s] * inner[i] - in_nats * (2 * quadratic[i] * t[i] + linear[i]);
        grad_u[i * kSteps + s] += outer;
        for (int j = 0; j < i; ++j) grad_u[j * kSteps + s] += shear[below(i, j)] * outer;
      }
    }
  }

 private:
  double top, w[D], rest[D];
  Real mean[D], shear[kBelow], quadratic[D], linear[D];  // shear: T below its diagonal

  // Computes t = T (u - mean); each entry of mean and T is copied to all lanes of a vector.
  struct Shear {
    V mean[D], factor[kBelow];

    explicit Shear(const Component& component) {
      for (int i = 0; i < D; ++i) mean[i] = lanes(component.mean[i]);
      for (int i = 0; i < D * (D - 1) / 2; ++i) factor[i] = lanes(component.shear[i]);
    }

    void operator()(const V* u, int s, V* t) const {
      for (int i = 0; i < D; ++i) t[i] = u[i * kSteps + s] - mean[i];
      for (int i = D - 1; i > 0; --i)
        for (int j = 0; j < i; ++j) t[i] += factor[below(i, j)] * t[j];
    }
  };
};

}  // namespace
