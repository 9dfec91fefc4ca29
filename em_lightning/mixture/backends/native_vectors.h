// Vectors of float or double, for native.cpp, which explains the macros REAL, KIND and FEATURES.

#include <algorithm>
#include <cstdint>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

using Real = REAL;
constexpr bool kSingle = std::is_same<Real, float>::value;
using Int = std::conditional<kSingle, int32_t, int64_t>::type;
typedef Real V __attribute__((vector_size(kBytes)));
typedef Int I __attribute__((vector_size(kBytes)));

constexpr int kLanes = kBytes / sizeof(Real);
// Points of a block: the fastest of 128, 256 and 512 in measurements of the E-step on one CPU, or close to it.
constexpr int kBlockPoints = KIND == 0 ? 256 : 128;
constexpr int kSteps = kBlockPoints / kLanes;  // vectors per feature of a block
// Blocks that are added up in Real before they are added in double: 512 points, or 1024 for the many sums of wide full
// covariances (native_wide.h).
constexpr int kBlocksPerSum = (KIND == 0 && FEATURES > 6 ? 1024 : 512) / kBlockPoints;
constexpr int64_t kRowsPerTask = 2048;  // fixed, so that results do not depend on the number of threads
constexpr Real kNegligible = kSingle ? 1e-20 : 1e-60;  // smaller responsibilities are lost in the rounding of sums
constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// 2^x on [-1/2, 1/2]. Float: the polynomial of least relative error that is 1 at 0; its error, with coefficients in float,
// is 1.1e-7. Double: Taylor's series, of error 6e-18.
struct Power {
  static constexpr int degree = kSingle ? 5 : 13;
  Real coefficients[14] = {1.0, 0.693146978, 0.240222421, 0.0555073374, 0.00967151265, 0.00132647276};
  constexpr Power() {
    double taylor = 1.0;  // log(2)^i / i!
    for (int i = 1; i <= degree && !kSingle; ++i) coefficients[i] = Real(taylor *= kLn2 / i);
  }
};

// While one exists, results below the normal numbers are 0 in its thread, or kept if `on` is false. Responsibilities of
// far components are such results, and those that are not 0 delay a processor of Intel by over 100 cycles.
struct FlushSubnormals {
#if defined(__SSE__)
  const unsigned before = _mm_getcsr();
  explicit FlushSubnormals(bool on = true) { _mm_setcsr(on ? before | 0x8000 : before & ~0x8000u); }
  ~FlushSubnormals() { _mm_setcsr(before); }
#else
  explicit FlushSubnormals(bool = true) {}
#endif
};

// A number in all lanes.
inline V lanes(Real number) { return number - V{}; }

// The larger of both; NaN if b is.
inline V larger(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (kSingle) return (V)_mm512_max_ps((__m512)a, (__m512)b);
  else return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX__)
  if constexpr (kSingle) return (V)_mm256_max_ps((__m256)a, (__m256)b);
  else return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// Replaces each x <= 1 by 2^x, or 0 below the range of Real. Operations alternate between the vectors, so that the
// processor need not wait for results.
template <int kCount>
inline void exp2(V (&x)[kCount]) {
  constexpr int digits = kSingle ? 23 : 52;
  constexpr Real bias = kSingle ? 127 : 1023;
  // Adding it rounds x to an integer n, and the low bits of the sum are n + bias.
  constexpr Real magic = Real(1.5) * Real(Int(1) << digits) + bias;
  constexpr Power series;
  V shifted[kCount], fraction[kCount], power[kCount];
  for (int i = 0; i < kCount; ++i) x[i] = larger(lanes(-bias), x[i]);  // for n = -bias, the scale below is 0
  for (int i = 0; i < kCount; ++i) shifted[i] = x[i] + magic;
  for (int i = 0; i < kCount; ++i) fraction[i] = x[i] - (shifted[i] - magic);
  for (int i = 0; i < kCount; ++i) power[i] = lanes(series.coefficients[Power::degree]);
  for (int j = Power::degree - 1; j >= 0; --j)
    for (int i = 0; i < kCount; ++i) power[i] = power[i] * fraction[i] + series.coefficients[j];
  // 2^n, as the shift moves n + bias into the exponent.
  for (int i = 0; i < kCount; ++i) x[i] = power[i] * (V)((I)shifted[i] << digits);
}

// A number whose bit i tells whether x of lane i is above a bound or NaN.
inline unsigned lanes_above(V x, Real bound) {
  const I above = ~(x <= bound);
#if defined(__AVX512DQ__)
  if constexpr (kSingle) return _mm512_movepi32_mask((__m512i)above);
  else return _mm512_movepi64_mask((__m512i)above);
#elif defined(__AVX__) && !defined(__AVX512F__)
  if constexpr (kSingle) return _mm256_movemask_ps((__m256)above);
  else return _mm256_movemask_pd((__m256d)above);
#else
  unsigned found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= unsigned(above[lane] & 1) << lane;
  return found;
#endif
}

// log2(x) for positive x that are not subnormal, by the series of 2 atanh(ratio) = log(x), to below round-off.
inline V log2(V x) {
  constexpr int digits = kSingle ? 23 : 52;
  constexpr Int root = kSingle ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcdLL);  // the bits of sqrt(1/2)
  const I exponent = ((I)x - root) >> digits;  // such that the mantissa lies in [sqrt(1/2), sqrt(2))
  const V mantissa = (V)((I)x - (exponent << digits));
  const V ratio = (mantissa - Real(1)) / (mantissa + Real(1)), square = ratio * ratio;
  constexpr int terms = kSingle ? 5 : 11;
  V series = lanes(Real(1.0 / (2 * terms - 1)));
  for (int i = terms - 2; i >= 0; --i) series = series * square + Real(1.0 / (2 * i + 1));
  return Real(2 * kLog2e) * ratio * series + __builtin_convertvector(exponent, V) + (x - x);  // NaN stays NaN
}

}  // namespace
