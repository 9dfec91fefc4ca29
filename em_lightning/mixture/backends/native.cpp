// The E-step of Gaussian mixtures on a CPU: responsibilities and sums of whitened points in one pass, and its gradient.
//
// For each set b, point n and component k, with z_n = (x_n - center) / unit, y = W_k (z_n - mu_k) and peak_k the joint
// log-density at mu_k:
//   g_nk = peak_k - |y|^2 / 2,  r_nk = softmax_k(g_nk),  sums_k = sum_n w_n r_nk [1, y, s(y)],
// where s(y) holds the products y_i y_j (j <= i) for full covariances, the squares y_i^2 for diagonal ones, and |y|^2
// for spherical ones. Whitened points are of order one, however thin a component is, so that float32 suffices for
// float32 points. Block sums are accumulated in double and then converted to sums of [1, z, s(z)], with
// z = mu_k + L_k y. For full covariances, s(y) is the lower triangle of y y^T row by row, s(z) the upper triangle of
// z z^T row by row.
//
// Points are read as u = (x - origin) / unit in Real. The origin is the center rounded to Real, and the unit is
// bounded; means and W are converted from coordinates z to u.
//
// Compiled once per kind of covariance, number of features and dtype: REAL is float or double, KIND 0 (full, FEATURES
// features), 1 (diagonal) or 2 (spherical). Vectors are those of GCC and Clang. V holds kLanes numbers, one per point.
// A step is one vector of points, and a block of points has kSteps of them. Do not compile with -ffast-math, which
// ignores infinities and NaN.

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <system_error>
#include <thread>

#if KIND == 0
#include "native_full.h"
#else
#include "native_diagonal.h"
#endif

namespace {

struct Problem {
  int64_t sets, components, features, items;
  const Real* x;
  int64_t set_stride, feature_stride, item_stride;
  const double *weights, *means, *inverse, *peak, *scale, *center, *unit;  // inverse is W, scale is L
  const double* grads;  // of the sums (null in the forward pass, or if they have no gradient)
  double *sums, *log_likelihood, *log_density;
  Real* grad_x;
  double* grad_weights;
  // With covariances, the whole EM step is computed: W, L and peak above are null, as they follow from these
  // parameters, and the M-step with the floor (B,) of variances writes the next ones.
  const double *log_weights, *covariances, *floor;
  double *next_log_weights, *next_means, *next_covariances;
  const double* grad_density;  // the gradient of the log-densities (null in the forward pass)
  int64_t grad_density_set_stride, grad_density_item_stride;
};

// The points of a block whose responsibilities for a component are not negligible, in groups of kGrain points: 1 or
// kLanes, or 0 if this kind of covariance skips no points. They are copied to consecutive places ("gathered"), unless
// they are over three quarters of the block (chosen, not measured), where there is little to save.
struct Choice {
  bool gathered = false;
  int steps = 0;                          // vectors of points to process, gathered or not
  int count = 0, place[kSteps * kLanes];  // number of groups that are not negligible, and where they start

  // Chooses points by their responsibilities r, in all_steps vectors.
  void find(const V* r, int all_steps) {
    steps = all_steps;
    if (!kGrain) return;
    count = 0;
    for (int s = 0; s < all_steps; ++s) {
      unsigned mask = lanes_above(r[s], kNegligible);
      if (kGrain == kLanes) {
        place[count] = s * kLanes;
        count += mask != 0;
      } else {
        // For each set bit of the mask, from the lowest: mask &= mask - 1 clears it.
        for (; mask; mask &= mask - 1) place[count++] = s * kLanes + __builtin_ctz(mask);
      }
    }
    gathered = 4 * count * kGrain < 3 * all_steps * kLanes;
    if (gathered) steps = (count * kGrain + kLanes * kUnrolled - 1) / (kLanes * kUnrolled) * kUnrolled;
  }

  // Returns a row of values of the chosen points, with zeros behind them, or the row itself if they are not gathered.
  const V* gather(const V* from, V* to) const {
    if (!gathered) return from;
    const Real* values = reinterpret_cast<const Real*>(from);
    Real* target = reinterpret_cast<Real*>(to);
    for (int s = count * kGrain / kLanes; s < steps; ++s) to[s] = V{};
    for (int n = 0; n < count; ++n) std::memcpy(target + n * kGrain, values + place[n], kGrain * sizeof(Real));
    return to;
  }

  // Adds a row of values of the chosen points to their places.
  void scatter(const V* from, V* to) const {
    const Real* values = reinterpret_cast<const Real*>(from);
    Real* target = reinterpret_cast<Real*>(to);
    for (int n = 0; n < count; ++n)
      for (int i = 0; i < kGrain; ++i) target[place[n] + i] += values[n * kGrain + i];
  }
};

// Processes rows of one set at a time, block by block, with buffers that all blocks of a thread share.
class Worker {
 public:
  explicit Worker(const Problem& problem)
      : p(problem), K(p.components), M(num_sums(p.features)), G(p.grad_density ? gradient_size(p.features) : 0) {
    points.resize(p.features * kSteps);
    white.resize(kRows * kSteps);
    score.resize(K * kSteps);
    slope.resize(p.grad_density ? K * kSteps : 0);
    sums.resize(K * M + 1);
    gradients.resize(K * G);
    grad_points.resize(p.grad_x ? p.features * kSteps : 0);
    chosen_points.resize(kGrain ? p.features * kSteps : 0);
    chosen_grads.resize(kGrain ? grad_points.size() : 0);
  }

  // Writes the K M sums of the rows from first to last - 1 of a set, and the log-likelihood after them.
  void run(int64_t set_of_rows, int64_t first, int64_t last, double* result) {
    if (set_of_rows != set) enter(set_of_rows);
    constexpr int rows = kSteps * kLanes;  // of a block
    for (int64_t row = first; row < last; row += rows) {
      const int count = std::min<int64_t>(rows, last - row);
      const int steps = (count + kLanes * kUnrolled - 1) / (kLanes * kUnrolled) * kUnrolled;
      load(row, count, steps * kLanes);
      const FlushSubnormals flush;  // not before: points may be subnormal
      evaluate(steps);
      if (p.grad_density) {
        backward(row, count, steps);
      } else {
        forward(row, count, steps);
      }
    }
    for (int64_t i = 0; i <= K * M; ++i) result[i] = sum_of_lanes(sums[i]);
    std::fill(sums.begin(), sums.end(), V{});
    for (int64_t k = 0; k < K; ++k) components[k].whiten_sums(result + k * M);  // to sums of [1, y, s(y)]
  }

  // Adds the results of all tasks of the set of the last run, in their order, to those of the first. Converts them from
  // whitened points to z. A result has K M sums and the log-likelihood.
  void finish(double* result, int64_t tasks) {
    const int64_t size = K * M + 1, factor = factor_size(p.features);
    for (int64_t task = 1; task < tasks; ++task)
      for (int64_t i = 0; i < size; ++i) result[i] += result[task * size + i];
    if (p.log_likelihood) p.log_likelihood[set] = result[size - 1];
    for (int64_t k = 0; p.sums && k < K; ++k) {
      const int64_t row = set * K + k;
      const double* own = result + k * M;
      const double* l = scale + k * factor;
      if (p.grad_density) {
        parameter_gradient(own, l, inverse + k * factor, p.features, p.sums + row * (1 + p.features + factor));
      } else {
        unwhiten(own, l, p.means + row * p.features, p.features, p.sums + row * M);
      }
    }
    if (p.covariances) maximize();
  }

 private:
  const Problem& p;
  const int64_t K, M, G;                      // components; per component, number of sums and of stored gradients
  int64_t set = -1;                           // of the rows that are processed; -1: none yet
  const double *inverse, *scale, *peak;       // of the components of this set, given or computed
  std::vector<double> factors;                // those that are computed
  std::vector<Component> components;          // of this set
  std::vector<Real> gradients, origin;        // gradients of the sums (K, G); origin of the coordinates u (D,)
  std::vector<V> points, grad_points;         // u, and the gradient in u, both (D, kSteps)
  std::vector<V> white;                       // y of one component (kRows, kSteps); kRows may be 0: not stored
  std::vector<V> score, slope;                // both (K, kSteps): see evaluate and backward
  std::vector<V> sums;                        // (K, M) and the log-likelihood, separately for each lane
  V weights[kSteps], grad_density[kSteps], largest[kSteps], total[kSteps], mean_slope[kSteps];
  Choice choice;                              // the points that count for the current component
  const V *chosen, *y;                        // these points in coordinates u, and whitened
  std::vector<V> chosen_points, chosen_grads;  // buffers of gathered points: u, and the gradient in u
  V chosen_r[kSteps], chosen_slope[kSteps];
  Real inverse_unit = 1;

  // Converts the components of a set to the coordinates u.
  void enter(int64_t new_set) {
    set = new_set;
    // The unit of points and W stay normal numbers in Real. Let max be the largest number of Real. With entries of W of
    // at most max^0.4, |y|^2 is at most about max^0.8 |u - mu|^2 and thus finite for |u - mu|^2 up to max^0.2.
    using Limits = std::numeric_limits<Real>;
    const double unit = std::min(std::max(p.unit[set], double(Limits::min())), 1.0 / double(Limits::min()));
    const double ratio = unit / p.unit[set], inverse_ratio = p.unit[set] / unit;
    const double bound = std::pow(double(Limits::max()), 0.4);
    const int64_t features = p.features, size = factor_size(features);
    inverse_unit = Real(1.0 / unit);
    if (p.covariances) {
      factorize();
    } else {
      inverse = p.inverse + set * K * size, scale = p.scale + set * K * size, peak = p.peak + set * K;
    }
    std::vector<double> component_mean(features), shift(features), scaled(size), gradient(M);
    const double* center = p.center + set * features;
    origin.assign(center, center + features);
    for (int64_t i = 0; i < features; ++i) shift[i] = (center[i] - rounded(center[i])) / unit;
    components.clear();
    components.reserve(K);
    for (int64_t k = 0; k < K; ++k) {
      const double* mean = p.means + (set * K + k) * features;
      for (int64_t i = 0; i < features; ++i)
        component_mean[i] = mean[i] * inverse_ratio + shift[i];
      for (int64_t i = 0; i < size; ++i)
        scaled[i] = std::min(std::max(inverse[k * size + i] * ratio, -bound), bound);
      components.emplace_back(scaled.data(), component_mean.data(), peak[k], features);
      if (p.grads) {
        whiten_gradient(p.grads + (set * K + k) * M, scale + k * size, mean, features, gradient.data());
        components.back().store_gradient(gradient.data(), &gradients[k * G]);
      }
    }
  }

  // Computes W, L and the log-densities at the means from the covariances of the set.
  void factorize() {
    const int64_t features = p.features, size = factor_size(features);
    factors.resize(K * (2 * size + 1));
    double *w = factors.data(), *l = w + K * size, *at_mean = l + K * size;
    inverse = w, scale = l, peak = at_mean;
    const double normalizer = 0.5 * features * std::log(2.0 * 3.14159265358979323846);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t row = set * K + k;
      const double log_det = factorize_covariance(p.covariances + row * size, p.means + row * features, features,
                                                  l + k * size, w + k * size);
      at_mean[k] = p.log_weights[row] + log_det - normalizer;
    }
  }

  // Writes the parameters of the M-step from the sums of the set. A covariance has as many entries as its factor.
  void maximize() const {
    const int64_t features = p.features, size = factor_size(features);
    const double* sums_of_set = p.sums + set * K * M;
    for (int64_t k = 0; k < K; ++k) {
      const double* own = sums_of_set + k * M;
      const int64_t row = set * K + k;
      gaussian::estimate(KIND, features, own[0], own + 1, own + 1 + features, p.floor[set],
                         p.next_means + row * features, p.next_covariances + row * size);
    }
    gaussian::estimate_weights(K, sums_of_set, M, p.next_log_weights + set * K);
  }

  // Copies rows as u, feature by feature. Rows that fill up the last vectors repeat the last row with weight zero.
  void load(int64_t row, int count, int padded) {
    for (int64_t i = 0; i < p.features; ++i) {
      const Real* from = p.x + set * p.set_stride + i * p.feature_stride + row * p.item_stride;
      Real *to = reinterpret_cast<Real*>(&points[i * kSteps]), zero = origin[i];
      if (p.item_stride == 1) {
        for (int n = 0; n < count; ++n) to[n] = (from[n] - zero) * inverse_unit;
      } else {
        for (int n = 0; n < count; ++n) to[n] = (from[n * p.item_stride] - zero) * inverse_unit;
      }
      std::fill(to + count, to + padded, to[count - 1]);
    }
    Real* to = reinterpret_cast<Real*>(weights);
    for (int n = 0; n < count; ++n) to[n] = p.weights ? Real(p.weights[set * p.items + row + n]) : Real(1);
    std::fill(to + count, to + padded, Real(0));
  }

  // Chooses the points of component k by their responsibilities, and whitens them.
  void choose(int64_t k, const V* r, int steps) {
    choice.find(r, steps);
    chosen = choice.gathered ? chosen_points.data() : points.data();
    for (int64_t i = 0; choice.gathered && i < p.features; ++i)
      choice.gather(&points[i * kSteps], &chosen_points[i * kSteps]);
    y = components[k].whitened(chosen, choice.steps, white.data());
  }

  V log_density(int s) const { return Real(kLn2) * (largest[s] + log2(total[s])); }

  // Leaves exp(g - max g) in score, its sum over components in total, and max g / log 2 in largest.
  void evaluate(int steps) {
    std::fill(largest, largest + steps, lanes(-std::numeric_limits<Real>::infinity()));
    std::fill(total, total + steps, V{});
    for (int64_t k = 0; k < K; ++k)
      components[k].score(points.data(), steps, white.data(), &score[k * kSteps], largest);
    for (int64_t k = 0; k < K; ++k) {
      V* own = &score[k * kSteps];
      for (int s = 0; s < steps; s += 2) {  // steps are even; exp2 is faster for two vectors
        V both[2] = {own[s] - largest[s], own[s + 1] - largest[s + 1]};
        exp2(both);
        for (int i = 0; i < 2; ++i) total[s + i] += own[s + i] = both[i];
      }
    }
  }

  void forward(int64_t row, int count, int steps) {
    if (p.log_density) {
      V densities[kSteps];
      for (int s = 0; s < steps; ++s) densities[s] = log_density(s);
      const Real* lanes = reinterpret_cast<const Real*>(densities);
      std::copy(lanes, lanes + count, p.log_density + set * p.items + row);
      return;
    }
    if (p.log_likelihood) {
      V own = {};
      for (int s = 0; s < steps; ++s) own += weights[s] * log_density(s);
      sums[K * M] += own;
    }
    V factor[kSteps];  // w_n r_nk = factor * score
    for (int s = 0; s < steps; ++s) factor[s] = weights[s] / total[s];
    for (int64_t k = 0; k < K; ++k) {
      V* r = &score[k * kSteps];
      if (!kGrain) {  // such components do not read y, the second argument
        components[k].add(points.data(), nullptr, steps, [&](int s) { return r[s] * factor[s]; }, &sums[k * M]);
        continue;
      }
      for (int s = 0; s < steps; ++s) r[s] *= factor[s];
      choose(k, r, steps);
      const V* r_of_chosen = choice.gather(r, chosen_r);
      components[k].add(chosen, y, choice.steps, [&](int s) { return r_of_chosen[s]; }, &sums[k * M]);
    }
  }

  // The derivative of the loss in the joint log-density g_nk is w_n r_nk (a_nk - sum_j r_nj a_nj + l_n). Here a_nk
  // (slope) is the derivative of the loss in w_n r_nk, through the sums, and l_n (grad_density) is the one in
  // w_n log p(z_n). The gradients of the parameters follow from the sums of [1, y, s(y)] with this weight.
  void backward(int64_t row, int count, int steps) {
    Real* to = reinterpret_cast<Real*>(grad_density);
    const double* from = p.grad_density + set * p.grad_density_set_stride + row * p.grad_density_item_stride;
    for (int n = 0; n < count; ++n) to[n] = Real(from[n * p.grad_density_item_stride]);
    std::fill(to + count, to + steps * kLanes, Real(0));
    std::fill(mean_slope, mean_slope + steps, V{});
    V share[kSteps];  // the factor from score to r_nk
    for (int s = 0; s < steps; ++s) share[s] = Real(1) / total[s];
    for (int64_t k = 0; k < K; ++k) {
      V *r = &score[k * kSteps], *a = &slope[k * kSteps];
      for (int s = 0; s < steps; ++s) r[s] *= share[s];
      if (!p.grads) {
        std::fill(a, a + steps, V{});
        continue;
      }
      choose(k, r, steps);
      components[k].slope(chosen, y, choice.steps, &gradients[k * G], choice.gathered ? chosen_slope : a);
      if (choice.gathered) {
        std::fill(a, a + steps, V{});
        choice.scatter(chosen_slope, a);
      }
      for (int s = 0; s < steps; ++s) mean_slope[s] += r[s] * a[s];
    }
    if (p.grad_weights) {
      V slopes[kSteps];
      for (int s = 0; s < steps; ++s) slopes[s] = mean_slope[s] + grad_density[s] * log_density(s);
      const Real* lanes = reinterpret_cast<const Real*>(slopes);
      std::copy(lanes, lanes + count, p.grad_weights + set * p.items + row);
    }
    std::fill(grad_points.begin(), grad_points.end(), V{});
    for (int64_t k = 0; k < K; ++k) {
      V *r = &score[k * kSteps], *a = &slope[k * kSteps];
      V* grad_score = a;  // replaces the slopes by the gradients in g_nk
      for (int s = 0; s < steps; ++s) {
        r[s] *= weights[s];
        grad_score[s] = r[s] * (a[s] - mean_slope[s] + grad_density[s]);
      }
      choose(k, r, steps);
      const V* grad_of_chosen = choice.gather(grad_score, chosen_slope);
      components[k].add(chosen, y, choice.steps, [&](int s) { return grad_of_chosen[s]; }, &sums[k * M]);
      if (!p.grad_x) continue;
      // Add the gradients in the points.
      V* grads = choice.gathered ? chosen_grads.data() : grad_points.data();
      if (choice.gathered) std::fill(chosen_grads.begin(), chosen_grads.end(), V{});
      components[k].pull(chosen, y, choice.steps, &gradients[k * G], choice.gather(r, chosen_r), grad_of_chosen, grads);
      for (int64_t i = 0; choice.gathered && i < p.features; ++i)
        choice.scatter(&grads[i * kSteps], &grad_points[i * kSteps]);
    }
    if (p.grad_x)
      for (int64_t i = 0; i < p.features; ++i) {
        const Real* lanes = reinterpret_cast<const Real*>(&grad_points[i * kSteps]);
        Real* to = p.grad_x + (set * p.features + i) * p.items + row;
        for (int n = 0; n < count; ++n) to[n] = lanes[n] * inverse_unit;
      }
  }
};

}  // namespace

// Writes sums (B, K, M) and log-likelihoods (B,), or log-densities (B, N); with covariances also the parameters of the
// M-step. With grad_density it writes instead of the sums the gradients of peak, mean and W, and grad_x (B, D, N) and
// grad_weights (B, N) unless they are null.
extern "C" void em_lightning_e_step(const Problem* problem, int64_t threads) {
  const Problem& p = *problem;
  const int64_t size = p.components * num_sums(p.features) + 1;
  const int64_t tasks_per_set = std::max<int64_t>((p.items + kRowsPerTask - 1) / kRowsPerTask, 1);
  const int64_t tasks = p.sets * tasks_per_set;
  const std::unique_ptr<double[]> results(new double[tasks * size]);  // not zero: tasks write all of theirs
  std::vector<std::atomic<int64_t>> unfinished(p.sets);
  for (auto& count : unfinished) count = tasks_per_set;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    Worker worker(p);
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t set = task / tasks_per_set, first = task % tasks_per_set * kRowsPerTask;
      worker.run(set, first, std::min(first + kRowsPerTask, p.items), &results[task * size]);
      if (--unfinished[set] == 0) worker.finish(&results[set * tasks_per_set * size], tasks_per_set);
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min(threads, tasks); ++i) others.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads: those that run do all tasks
  }
  work();
  for (auto& other : others) other.join();
}
