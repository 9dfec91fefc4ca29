// The E-step of Gaussian mixtures on a CPU: responsibilities and sums of whitened points in one pass, and its gradient.
//
// For each set b, point n and component k, with y = W_k (x_n - mu_k):
//   g_nk = peak_k - |y|^2 / 2,  r_nk = softmax_k(g_nk),  sums_k = sum_n w_n r_nk [1, y, s(y)],
// where s(y) holds the products y_i y_j (j <= i), the squares y_i^2, or |y|^2. Whitened points are of order one, however
// thin a component is, so that float32 suffices for float32 points. Sums of blocks are added in double, in which they
// become the sums of [1, z, s(z)], with z = (x - center) / unit = mu_k + L_k y and s(z) holding z_i z_j for i <= j.
//
// Compiled once per kind of covariance, number of features and dtype: REAL is float or double, KIND 0 (full, FEATURES
// features), 1 (diagonal) or 2 (spherical). Vectors are those of GCC and Clang; no option such as -ffast-math is needed,
// so that infinities and NaN keep their meaning.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#include "native_components.h"

namespace {

struct Problem {
  int64_t sets, components, features, items;
  const Real* x;
  int64_t set_stride, feature_stride, item_stride;
  const double *weights, *means, *inverse, *peak, *scale, *center, *unit;
  const double *grads, *outer;  // gradients of the sums, and of the log-densities (null in the forward pass)
  int64_t outer_set_stride, outer_item_stride;
  double *sums, *log_likelihood, *log_density;
  Real* grad_x;
  double* grad_weights;
};

// The rows of one set that one thread works on at a time.
struct Task {
  const Problem& p;
  const int64_t set, first, last;
  const int64_t K, M;  // components, and sums per component
  std::vector<V> u, white, weights, score, slope, outer, largest, total, mean, grad_u, sums;
  std::vector<Real> gradients;
  std::vector<double> wide;
  std::vector<Component> components;
  Real unit;  // of points in this code, the reciprocal

  Task(const Problem& problem, int64_t set, int64_t first, int64_t last)
      : p(problem), set(set), first(first), last(last), K(p.components), M(num_sums(p.features)),
        u(p.features * kSteps), white(K * D * kSteps), weights(kSteps), score(K * kSteps), slope(p.outer ? K * kSteps : 0),
        outer(kSteps), largest(kSteps), total(kSteps), mean(kSteps), grad_u(p.grad_x ? p.features * kSteps : 0), sums(K * M + 1),
        gradients(p.outer ? K * M : 0), wide((K * M + 1) * kLanes) {
    // Differences of points and means need no centered points. Their unit and W stay normal numbers in Real, and so do
    // the squares of whitened points.
    using Limits = std::numeric_limits<Real>;
    const double own = std::min(std::max(p.unit[set], double(Limits::min())), 1.0 / double(Limits::min()));
    const double ratio = own / p.unit[set], bound = std::pow(double(Limits::max()), 0.4);
    const int64_t features = p.features, size = factor_size(features);
    unit = Real(1.0 / own);
    std::vector<double> mean(features), inverse(size);
    components.reserve(K);
    for (int64_t k = set * K; k < (set + 1) * K; ++k) {
      for (int64_t i = 0; i < features; ++i)
        mean[i] = p.means[k * features + i] / ratio + p.center[set * features + i] / own;
      for (int64_t i = 0; i < size; ++i)
        inverse[i] = std::min(std::max(p.inverse[k * size + i] * ratio, -bound), bound);
      components.emplace_back(inverse.data(), mean.data(), p.peak[k], features);
      if (p.grads)
        whiten_gradient(p.grads + k * M, p.scale + k * size, p.means + k * features, features,
                        &gradients[(k - set * K) * M]);
    }
  }

  // Writes K M sums, and the log-likelihood after them.
  void run(double* result) {
    constexpr int rows = kSteps * kLanes;
    int pending = 0;
    for (int64_t row = first; row < last; row += rows) {
      const int count = std::min<int64_t>(rows, last - row);
      const int steps = (count + kLanes - 1) / kLanes;
      load(row, count, steps * kLanes);
      evaluate(steps);
      if (p.outer) {
        backward(row, count, steps);
      } else {
        forward(row, count, steps);
      }
      if (++pending == kBlocksPerSum || row + rows >= last) {
        const Real* narrow = reinterpret_cast<const Real*>(sums.data());
        for (size_t i = 0; i < wide.size(); ++i) wide[i] += double(narrow[i]);
        std::fill(sums.begin(), sums.end(), V{});
        pending = 0;
      }
    }
    for (int64_t i = 0; i <= K * M; ++i) {
      result[i] = 0.0;
      for (int lane = 0; lane < kLanes; ++lane) result[i] += wide[i * kLanes + lane];
    }
  }

 private:
  // Copies rows, feature by feature. Rows that fill up the last vector repeat the last row with weight zero.
  void load(int64_t row, int count, int padded) {
    for (int64_t i = 0; i < p.features; ++i) {
      const Real* from = p.x + set * p.set_stride + i * p.feature_stride + row * p.item_stride;
      Real* to = reinterpret_cast<Real*>(&u[i * kSteps]);
      for (int n = 0; n < count; ++n) to[n] = from[n * p.item_stride] * unit;
      std::fill(to + count, to + padded, to[count - 1]);
    }
    Real* to = reinterpret_cast<Real*>(weights.data());
    for (int n = 0; n < count; ++n) to[n] = p.weights ? Real(p.weights[set * p.items + row + n]) : Real(1);
    std::fill(to + count, to + padded, Real(0));
  }

  // Leaves exp(g - largest) in score, in units of log 2, and its sum over components in total.
  void evaluate(int steps) {
    for (int64_t k = 0; k < K; ++k) {
      V* own = &score[k * kSteps];
      components[k].score(u.data(), steps, white.data() + k * D * kSteps, own);
      if (k == 0) std::copy(own, own + steps, largest.begin());
      for (int s = 0; s < steps; ++s) largest[s] = own[s] > largest[s] ? own[s] : largest[s];
    }
    std::fill(total.begin(), total.end(), V{});
    for (int64_t k = 0; k < K; ++k) {
      V* own = &score[k * kSteps];
      for (int s = 0; s < steps; ++s) {
        own[s] = exp2(own[s] - largest[s]);
        total[s] += own[s];
      }
    }
  }

  V log_density(int s) const { return Real(kLn2) * (largest[s] + log2(total[s])); }

  void forward(int64_t row, int count, int steps) {
    if (p.log_density) {
      for (int s = 0; s < steps; ++s) mean[s] = log_density(s);
      const Real* found = reinterpret_cast<const Real*>(mean.data());
      std::copy(found, found + count, p.log_density + set * p.items + row);
      return;
    }
    if (p.log_likelihood)
      for (int s = 0; s < steps; ++s) sums[K * M] += weights[s] * log_density(s);
    for (int s = 0; s < steps; ++s) total[s] = weights[s] / total[s];
    for (int64_t k = 0; k < K; ++k) {
      V* own = &score[k * kSteps];
      for (int s = 0; s < steps; ++s) own[s] *= total[s];
      components[k].add(u.data(), white.data() + k * D * kSteps, steps, own, &sums[k * M]);
    }
  }

  // The derivative of the joint log-density g_nk is w_n r_nk (a_nk - sum_j r_nj a_nj + l), where a_nk is the derivative
  // of sums_k in w_n r_nk and l that of the log-density of point n per weight. Sums over points of [1, y, s(y)] under it
  // give those of the parameters.
  void backward(int64_t row, int count, int steps) {
    Real* to = reinterpret_cast<Real*>(outer.data());
    const double* from = p.outer + set * p.outer_set_stride + row * p.outer_item_stride;
    for (int n = 0; n < count; ++n) to[n] = Real(from[n * p.outer_item_stride]);
    std::fill(to + count, to + steps * kLanes, Real(0));
    std::fill(mean.begin(), mean.end(), V{});
    for (int64_t k = 0; k < K; ++k) {
      V *r = &score[k * kSteps], *a = &slope[k * kSteps];
      std::fill(a, a + steps, V{});  // the block before has left its own
      if (p.grads) components[k].slope(u.data(), white.data() + k * D * kSteps, steps, &gradients[k * M], a);
      for (int s = 0; s < steps; ++s) {
        r[s] /= total[s];
        mean[s] += r[s] * a[s];
      }
    }
    if (p.grad_weights) {
      V of_weights[kSteps];
      for (int s = 0; s < steps; ++s) of_weights[s] = mean[s] + outer[s] * log_density(s);
      const Real* found = reinterpret_cast<const Real*>(of_weights);
      std::copy(found, found + count, p.grad_weights + set * p.items + row);
    }
    std::fill(grad_u.begin(), grad_u.end(), V{});
    for (int64_t k = 0; k < K; ++k) {
      V *r = &score[k * kSteps], *a = &slope[k * kSteps];
      for (int s = 0; s < steps; ++s) {
        r[s] *= weights[s];
        a[s] = r[s] * (a[s] - mean[s] + outer[s]);
      }
      components[k].add(u.data(), white.data() + k * D * kSteps, steps, a, &sums[k * M]);
      if (p.grad_x) components[k].pull(u.data(), white.data() + k * D * kSteps, steps, &gradients[k * M], r, a, grad_u.data());
    }
    if (p.grad_x)
      for (int64_t i = 0; i < p.features; ++i) {
        const Real* from = reinterpret_cast<const Real*>(&grad_u[i * kSteps]);
        Real* to = p.grad_x + (set * p.features + i) * p.items + row;
        for (int n = 0; n < count; ++n) to[n] = from[n] * unit;
      }
  }
};

}  // namespace

// Writes sums (B, K, M) and the log-likelihood (B,), or log-densities (B, N). With outer it writes in place of the sums
// the gradients of peak, mean and W, and grad_x (B, D, N) and grad_weights (B, N) unless they are null.
extern "C" void em_lightning_e_step(const Problem* problem, int64_t threads) {
  const Problem& p = *problem;
  const int64_t size = p.components * num_sums(p.features) + 1;
  const int64_t tasks_per_set = std::max<int64_t>((p.items + kRowsPerTask - 1) / kRowsPerTask, 1);
  const int64_t tasks = p.sets * tasks_per_set;
  std::vector<double> results(tasks * size);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t first = task % tasks_per_set * kRowsPerTask;
      Task(p, task / tasks_per_set, first, std::min(first + kRowsPerTask, p.items)).run(&results[task * size]);
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min(threads, tasks); ++i) others.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads: those that run do all tasks
  }
  work();
  for (auto& other : others) other.join();
  const int64_t features = p.features, factor = factor_size(features), M = num_sums(features);
  for (int64_t set = 0; p.sums && set < p.sets; ++set) {
    double* sums = &results[set * tasks_per_set * size];
    for (int64_t task = 1; task < tasks_per_set; ++task)
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[task * size + i];
    for (int64_t k = 0; k < p.components; ++k) {
      const int64_t place = set * p.components + k;
      const double* scale = p.scale + place * factor;
      if (p.outer) {
        parameter_gradient(sums + k * M, scale, p.inverse + place * factor, features,
                           p.sums + place * (1 + features + factor));
      } else {
        unwhiten(sums + k * M, scale, p.means + place * features, features, p.sums + place * M);
      }
    }
    if (p.log_likelihood) p.log_likelihood[set] = sums[size - 1];
  }
}
