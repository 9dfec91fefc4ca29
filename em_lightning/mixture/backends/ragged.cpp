// EM of spherical mixtures for many sets of any size, and its gradient: one set at a time, in double.
//
// EM starts from the farthest points, as mixture/initialization.py does, and takes T iterations of
//   r_nk = softmax_k(log pi_k - D/2 log v_k - d_nk / (2 v_k)),  d_nk = |z_n - mu_k|^2,
//   M_k = sum_n r_nk + eps,  pi'_k = M_k / sum_j M_j,  mu'_k = sum_n r_nk z_n / M_k,
//   v'_k = (sum_n r_nk |z_n - mu'_k|^2 + S) / (M_k + 1) / D + floor,
// in coordinates z = (x - center) / scale about the mean of the set. The prior adds one point of squared distance S to
// each component; S is the share K^(-2/D) of the set's total variance. The scatter about the new mean is computed as
// sum_n r_nk d_nk - M_k |mu'_k - mu_k|^2.

#include <atomic>
#include <cmath>
#include <limits>
#include <system_error>
#include <thread>

#define REAL double
#define KIND 2
#define FEATURES 0
#include "native_vectors.h"

namespace {

constexpr double kFloor = 1e-6;  // added to every variance, in squared units of the points, as EMOperator by default
constexpr double kCore = 0.4;    // as _CORE in mixture/initialization.py, which has the reason
constexpr double kEps = 10.0 * std::numeric_limits<double>::epsilon();  // added to masses, as in mixture/m_step.py
// Both chosen, not measured.
constexpr int64_t kSetsPerTask = 16;  // so many that threads rarely wait for the common counter
constexpr int64_t kAhead = 8;  // row n + kAhead is fetched into the cache while row n is read

struct Problem {
  int64_t rows, features;
  const void* x;       // (rows, features)
  const int64_t* set;  // of each row
  int64_t sets, limit, components, iterations;  // limit: only the first ``limit`` rows of a set are used
  double *log_weights, *means, *log_scales;  // (sets, K), (sets, K, features), log(v_k) / 2 (sets, K)
  const double *grad_log_weights, *grad_means, *grad_log_scales;
  void* grad_x;  // null in the forward pass
};

// The rows of each set in their order: set b has order[first[b]] to order[first[b + 1] - 1]. Behind them are kAhead
// zeros, so that the last rows can fetch row 0.
struct Rows {
  std::vector<int64_t> first, order;

  explicit Rows(const Problem& p) : first(p.sets + 1), order(p.rows + kAhead) {
    for (int64_t n = 0; n < p.rows; ++n) ++first[p.set[n] + 1];
    for (int64_t set = 0; set < p.sets; ++set) first[set + 1] += first[set];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t n = 0; n < p.rows; ++n) order[next[p.set[n]]++] = n;
  }
};

inline double sum(V values) {
  double total = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) total += values[lane];
  return total;
}

// The parameters of a mixture, with masses M_k instead of weights; or the gradients in them, and in log M_k for M_k.
struct Mixture {
  std::vector<double> mass, variances;
  std::vector<V> means;
};

// EM of one set at a time, in buffers that all sets of a thread share. Points and means fill P vectors V, with zeros
// behind their D numbers; kP is P, or 0 where it is only known at run time.
template <class Point, int kP>
class Fit {
 public:
  explicit Fit(const Problem& problem)
      : p(problem),
        D(p.features),
        K(p.components),
        P(kP ? kP : (D + kLanes - 1) / kLanes),
        prior_share(std::pow(double(K), -2.0 / D)),
        states(p.iterations + 1),
        grads(empty_mixture()) {
    for (auto& state : states) state = empty_mixture();
    centers.resize(K * P);
    cell_means.resize(K * P);
    slopes.resize(K * P);
    for (auto* values : {&mass, &core_mass, &reach, &inner, &peak, &precision, &constant, &per_distance, &of_r})
      values->resize(K);
  }

  // Fits the mixture of a set to ``count`` rows, or computes the gradients of these rows.
  void run(int64_t set_to_fit, const int64_t* rows_of_set, int64_t count) {
    set = set_to_fit, rows = rows_of_set, N = count;
    enter();
    start();
    for (int64_t t = 0; t < p.iterations; ++t) {
      e_step(states[t]);
      m_step(states[t], states[t + 1]);
    }
    if (p.grad_x) {
      backward();
    } else {
      leave();
    }
  }

 private:
  const Problem p;
  const int64_t D, K, P;
  const double prior_share;
  std::vector<Mixture> states;  // the start, and after each iteration
  Mixture grads;                // the gradients in one of them
  std::vector<V> centers, cell_means, slopes;  // (K, P)
  // All (K,). At the start: mass of the cells and their cores, and the squared radius (reach) of the cores. inner holds
  // sums of squared distances from the centers or means. In the E-step: peak and precision 1 / v_k. In step_backward:
  // see there; of_r is the derivative in r_nk of one point.
  std::vector<double> mass, core_mass, reach, inner, peak, precision, constant, per_distance, of_r;

  int64_t set, N;
  const int64_t* rows;
  std::vector<V> z, grad_z, responsibilities;  // (N, P), (N, P), (N, K) numbers
  std::vector<double> distances, nearest;      // squared: d (N, K), and from the mean or the nearest center (N,)
  std::vector<int64_t> cell;                   // the nearest center (N,)
  std::vector<V> center;                       // (P,)
  double scale, floor, prior_distance;         // of z; added to every variance in these coordinates; S

  Mixture empty_mixture() const { return {std::vector<double>(K), std::vector<double>(K), std::vector<V>(K * P)}; }

  int64_t width() const { return kP ? kP : P; }  // P, as a constant where the compiler knows it

  double squared_distance(const V* a, const V* b) const {
    V total = {};
    for (int64_t i = 0; i < width(); ++i) total += (a[i] - b[i]) * (a[i] - b[i]);
    return sum(total);
  }

  // The i-th vector of a row, with zeros behind its last number.
  V load(const Point* from, int64_t i) const {
    typedef Point Part __attribute__((vector_size(kLanes * sizeof(Point))));
    Part part = {};
    if ((i + 1) * kLanes <= D) {
      std::memcpy(&part, from + i * kLanes, sizeof part);
    } else {
      for (int64_t lane = 0; lane < D - i * kLanes; ++lane) part[lane] = from[i * kLanes + lane];
    }
    return __builtin_convertvector(part, V);
  }

  // Computes z, S and the squared distances from the mean. Sets with coordinates above one are scaled to at most one,
  // so that no square overflows.
  void enter() {
    z.resize(N * width());
    nearest.resize(N);
    center.assign(width(), V{});
    for (int64_t n = 0; n < N; ++n) {
      const Point* from = static_cast<const Point*>(p.x) + rows[n] * D;
      __builtin_prefetch(static_cast<const Point*>(p.x) + rows[n + kAhead] * D);
      for (int64_t i = 0; i < width(); ++i) center[i] += z[n * width() + i] = load(from, i);
    }
    for (V& own : center) own *= 1.0 / N;
    V extent = {};
    for (int64_t n = 0; n < N; ++n)
      for (int64_t i = 0; i < width(); ++i) {
        const V own = z[n * width() + i] -= center[i];
        extent = extent < own ? own : extent < -own ? -own : extent;
      }
    double largest = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) largest = std::max(largest, extent[lane]);
    scale = largest > 1.0 ? std::ldexp(1.0, 1 + std::ilogb(largest)) : 1.0;
    const double eps = std::numeric_limits<Point>::epsilon();
    floor = std::max(kFloor / scale / scale, eps * eps);  // eps: rounding error of coordinates up to 1
    prior_distance = 0.0;
    for (int64_t n = 0; n < N; ++n) {
      V square = {};
      for (int64_t i = 0; i < width(); ++i) {
        const V own = z[n * width() + i] *= 1.0 / scale;
        square += own * own;
      }
      nearest[n] = sum(square);
      prior_distance += prior_share / N * nearest[n];
    }
  }

  // The mixture around the farthest points, as parameters_around in mixture/initialization.py.
  void start() {
    Mixture& state = states[0];
    cell.assign(N, 0);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t farthest = std::max_element(nearest.begin(), nearest.end()) - nearest.begin();
      std::copy(&z[farthest * width()], &z[farthest * width()] + width(), &centers[k * width()]);
      // For k = 0, nearest holds the distances from the mean, which choose the first center only.
      if (k == 0) std::fill(nearest.begin(), nearest.end(), std::numeric_limits<double>::infinity());
      for (int64_t n = 0; n < N; ++n) {
        const double distance = squared_distance(&z[n * width()], &centers[k * width()]);
        if (distance < nearest[n]) {
          nearest[n] = distance;
          cell[n] = k;
        }
      }
    }
    std::fill(mass.begin(), mass.end(), 0.0);
    std::fill(inner.begin(), inner.end(), 0.0);
    for (int64_t n = 0; n < N; ++n) {
      mass[cell[n]] += 1.0;
      inner[cell[n]] += nearest[n];
    }
    for (int64_t k = 0; k < K; ++k) reach[k] = kCore * inner[k] / std::max(mass[k], 1.0);
    std::fill(core_mass.begin(), core_mass.end(), 0.0);
    std::fill(cell_means.begin(), cell_means.end(), V{});
    std::fill(state.means.begin(), state.means.end(), V{});
    for (int64_t n = 0; n < N; ++n) {
      const int64_t k = cell[n];
      for (int64_t i = 0; i < width(); ++i) cell_means[k * width() + i] += z[n * width() + i];
      if (nearest[n] > reach[k]) continue;
      core_mass[k] += 1.0;
      for (int64_t i = 0; i < width(); ++i) state.means[k * width() + i] += z[n * width() + i];
    }
    double within = 0.0;  // the variance about the centers, of all cells together
    for (double of_cell : inner) within += of_cell / (D * N);
    for (int64_t k = 0; k < K; ++k) {
      V *mean = &state.means[k * width()], *cell_mean = &cell_means[k * width()], *own_center = &centers[k * width()];
      for (int64_t i = 0; i < width(); ++i) {
        cell_mean[i] *= 1.0 / (mass[k] + kEps);
        if (mass[k] == 0.0) {
          mean[i] = own_center[i];
        } else if (has_core(k)) {
          mean[i] *= 1.0 / (core_mass[k] + kEps);  // so far, the sum over the core
        } else {
          mean[i] = cell_mean[i];
        }
      }
      const double about_mean = inner[k] - mass[k] * squared_distance(cell_mean, own_center);
      state.variances[k] = floor + (has_variance(k) ? about_mean / (mass[k] + kEps) / D : within);
      state.mass[k] = mass[k] + kEps;
    }
  }

  // Whether a cell has enough points to use the mean of its core, and to use its own variance, as for the other
  // covariance types in mixture/initialization.py: with fewer points, full covariances would be nearly singular.
  bool has_core(int64_t k) const { return core_mass[k] > 2.0 * D; }
  bool has_variance(int64_t k) const { return mass[k] > D; }

  void e_step(const Mixture& state) {
    const int64_t size = N * K, steps = (size + kLanes - 1) / kLanes;
    responsibilities.resize(steps);
    distances.resize(size);
    double* r = reinterpret_cast<double*>(responsibilities.data());
    std::fill(r + size, r + steps * kLanes, 0.0);
    for (int64_t k = 0; k < K; ++k) {
      precision[k] = 1.0 / state.variances[k];
      peak[k] = std::log2(state.mass[k]) - 0.5 * D * std::log2(state.variances[k]);
    }
    for (int64_t n = 0; n < N; ++n) {
      double largest = -std::numeric_limits<double>::infinity();
      for (int64_t k = 0; k < K; ++k) {
        const double distance = distances[n * K + k] = squared_distance(&z[n * width()], &state.means[k * width()]);
        r[n * K + k] = peak[k] - 0.5 * kLog2e * distance * precision[k];
        largest = std::max(largest, r[n * K + k]);
      }
      for (int64_t k = 0; k < K; ++k) r[n * K + k] -= largest;
    }
    for (V& own : responsibilities) exp2(reinterpret_cast<V (&)[1]>(own));
    for (int64_t n = 0; n < N; ++n) {
      double total = 0.0;
      for (int64_t k = 0; k < K; ++k) total += r[n * K + k];
      const double share = 1.0 / total;
      for (int64_t k = 0; k < K; ++k) r[n * K + k] *= share;
    }
  }

  void m_step(const Mixture& before, Mixture& after) {
    const double* r = reinterpret_cast<const double*>(responsibilities.data());
    std::fill(after.mass.begin(), after.mass.end(), kEps);
    std::fill(inner.begin(), inner.end(), 0.0);
    std::fill(after.means.begin(), after.means.end(), V{});
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k) {
        const double own = r[n * K + k];
        after.mass[k] += own;
        inner[k] += own * distances[n * K + k];
        for (int64_t i = 0; i < width(); ++i) after.means[k * width() + i] += own * z[n * width() + i];
      }
    for (int64_t k = 0; k < K; ++k) {
      const double mass_k = after.mass[k];
      for (int64_t i = 0; i < width(); ++i) after.means[k * width() + i] *= 1.0 / mass_k;
      const double moved = squared_distance(&after.means[k * width()], &before.means[k * width()]);
      after.variances[k] = (inner[k] - mass_k * moved + prior_distance) / (mass_k + 1.0) / D + floor;
    }
  }

  void leave() const {
    const Mixture& state = states.back();
    const double* origin = reinterpret_cast<const double*>(center.data());
    for (int64_t k = 0; k < K; ++k) {
      const double* mean = reinterpret_cast<const double*>(&state.means[k * width()]);
      double* to = p.means + (set * K + k) * D;
      for (int64_t i = 0; i < D; ++i) to[i] = mean[i] * scale + origin[i];
      p.log_weights[set * K + k] = std::log(state.mass[k] / (N + K * kEps));
      p.log_scales[set * K + k] = 0.5 * std::log(state.variances[k] * scale * scale);
    }
  }

  void backward() {
    for (int64_t k = 0; k < K; ++k) {
      const double* of_mean = p.grad_means + (set * K + k) * D;
      double* to = reinterpret_cast<double*>(&grads.means[k * width()]);
      for (int64_t i = 0; i < D; ++i) to[i] = of_mean[i] * scale;
      grads.mass[k] = p.grad_log_weights[set * K + k];
      grads.variances[k] = 0.5 * p.grad_log_scales[set * K + k] / states.back().variances[k];
    }
    grad_z.assign(N * width(), V{});
    double grad_prior_distance = 0.0;
    for (int64_t t = p.iterations - 1; t >= 0; --t) {
      if (t < p.iterations - 1) e_step(states[t]);
      grad_prior_distance += step_backward(states[t], states[t + 1]);
    }
    start_backward(2.0 * prior_share / N * grad_prior_distance);
    for (int64_t n = 0; n < N; ++n) {
      const double* own = reinterpret_cast<const double*>(&grad_z[n * width()]);
      Point* to = static_cast<Point*>(p.grad_x) + rows[n] * D;
      for (int64_t i = 0; i < D; ++i) to[i] = Point(own[i] * (1.0 / scale));
    }
  }

  // Replaces the gradients of the mixture after an iteration by those before it; returns the gradient of S.
  // The derivative of the loss in r_nk, through M_k, mu'_k and v'_k, is
  //   constant_k + per_distance_k d_nk + slopes_k . (z_n - mu_k),
  // by the chain rule with z_n - mu'_k = z_n - mu_k - shift_k and shift_k = mu'_k - mu_k.
  double step_backward(const Mixture& before, const Mixture& after) {
    double grad_prior_distance = 0.0;
    for (int64_t k = 0; k < K; ++k) {
      const double mass_k = after.mass[k];
      const double of_scatter = grads.variances[k] / (mass_k + 1.0) / D;
      V moved_by = {}, along = {};
      for (int64_t i = k * width(); i < (k + 1) * width(); ++i) {
        const V shift = after.means[i] - before.means[i], per_mass = grads.means[i] * (1.0 / mass_k);
        moved_by += shift * shift;
        along += shift * per_mass;
        slopes[i] = per_mass - 2.0 * of_scatter * shift;
      }
      constant[k] = grads.mass[k] / mass_k - of_scatter * D * (after.variances[k] - floor) +
                    of_scatter * sum(moved_by) - sum(along);
      per_distance[k] = of_scatter;
      grad_prior_distance += of_scatter;
    }
    for (auto* values : {&grads.mass, &grads.variances}) std::fill(values->begin(), values->end(), 0.0);
    std::fill(grads.means.begin(), grads.means.end(), V{});
    for (int64_t n = 0; n < N; ++n) {
      const double *r = reinterpret_cast<const double*>(responsibilities.data()) + n * K, *d = &distances[n * K];
      const V* point = &z[n * width()];
      double mean = 0.0;
      for (int64_t k = 0; k < K; ++k) {
        V along = {};
        for (int64_t i = 0; i < width(); ++i)
          along += slopes[k * width() + i] * (point[i] - before.means[k * width() + i]);
        of_r[k] = constant[k] + per_distance[k] * d[k] + sum(along);
        mean += r[k] * of_r[k];
      }
      for (int64_t k = 0; k < K; ++k) {
        const double of_joint = r[k] * (of_r[k] - mean);  // the derivative in the joint log-density
        const double pull = of_joint * precision[k];      // times z_n - mu_k: the gradient in mu_k
        const double outward = 2.0 * per_distance[k] * r[k] - pull;  // times z_n - mu_k: a part of that in z_n
        grads.mass[k] += of_joint;
        grads.variances[k] += 0.5 * pull * (d[k] * precision[k] - D);
        for (int64_t i = 0; i < width(); ++i) {
          const V difference = point[i] - before.means[k * width() + i];
          grads.means[k * width() + i] += pull * difference;
          grad_z[n * width() + i] += outward * difference + r[k] * slopes[k * width() + i];
        }
      }
    }
    return grad_prior_distance;
  }

  // Adds the gradients through the start and S; the latter is of_square z_n. Points at distance zero from their center
  // share its gradient.
  void start_backward(double of_square) {
    double shared = 0.0;  // the gradient through within is shared * (z - center)
    for (int64_t k = 0; k < K; ++k)
      if (!has_variance(k)) shared += 2.0 * grads.variances[k] / (D * N);
    std::vector<double> at_center(K);  // the number of points at each center
    for (int64_t n = 0; n < N; ++n) at_center[cell[n]] += nearest[n] == 0.0;
    for (int64_t n = 0; n < N; ++n) {
      const int64_t k = cell[n];
      const double of_center = nearest[n] == 0.0 ? shared * mass[k] / at_center[k] : 0.0;
      const double weight_in_mean = !has_core(k)             ? 1.0 / (mass[k] + kEps)
                                    : nearest[n] <= reach[k] ? 1.0 / core_mass[k]
                                                             : 0.0;
      const double of_variance = has_variance(k) ? 2.0 * grads.variances[k] / (D * mass[k]) : 0.0;
      for (int64_t i = 0; i < width(); ++i) {
        const V own = z[n * width() + i];
        const V cell_mean = cell_means[k * width() + i], own_center = centers[k * width() + i];
        grad_z[n * width() + i] += of_square * own + weight_in_mean * grads.means[k * width() + i] +
                                   of_variance * (own - cell_mean) + shared * (own - own_center) -
                                   of_center * (cell_mean - own_center);
      }
    }
  }
};

template <class Point, int kP>
void fit_in_threads(const Problem& p, const Rows& rows, int64_t threads) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    const FlushSubnormals flush;
    Fit<Point, kP> fit(p);
    for (int64_t first = next.fetch_add(kSetsPerTask); first < p.sets; first = next.fetch_add(kSetsPerTask))
      for (int64_t set = first; set < std::min(first + kSetsPerTask, p.sets); ++set) {
        const int64_t count = std::min(rows.first[set + 1] - rows.first[set], p.limit);
        if (count > 0) fit.run(set, &rows.order[rows.first[set]], count);
      }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads: those that run do all sets
  }
  work();
  for (auto& other : others) other.join();
}

template <class Point>
void fit(const Problem& p, int64_t threads) {
  const Rows rows(p);
  const auto run = p.features <= kLanes       ? fit_in_threads<Point, 1>
                   : p.features <= 2 * kLanes ? fit_in_threads<Point, 2>
                   : p.features <= 4 * kLanes ? fit_in_threads<Point, 4>
                                              : fit_in_threads<Point, 0>;
  run(p, rows, threads);
}

}  // namespace

// Writes the mixtures, or the gradient of x. Sets without rows are left as they are. The set of each row must be at
// least 0 and less than the number of sets.
extern "C" void em_lightning_fit_float(const Problem* problem, int64_t threads) { fit<float>(*problem, threads); }
extern "C" void em_lightning_fit_double(const Problem* problem, int64_t threads) { fit<double>(*problem, threads); }
