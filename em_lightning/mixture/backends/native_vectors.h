// Vectors of float or double, for native.cpp, which explains the macros REAL, KIND and FEATURES, and for ragged.cpp.

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
// Fixed, so that results do not depend on the number of threads. The sums of the blocks of a task are added up in Real,
// those of tasks in double.
constexpr int64_t kRowsPerTask = 2048;  // chosen
constexpr Real kNegligible = kSingle ? 1e-20 : 1e-60;  // far below the rounding of sums of responsibilities, chosen
constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// exp2 splits x into an integer and a fraction, which lies in [0, 1] if this is true, or in [-1/2, 1/2]. The first is
// faster with AVX-512, which has an instruction for the multiplication by 2^floor(x).
#if defined(__AVX512DQ__)
constexpr bool kFloors = kSingle;
#else
constexpr bool kFloors = false;
#endif

// 2^x for fractions x. Float: the polynomial of least relative error that is 1 at 0; its error, with coefficients in
// float, is 0.9e-7. Double: Taylor's series, of error 6e-18.
struct Power {
  static constexpr int degree = kSingle ? 5 : 13;
  Real coefficients[14] = {1.0, 0.693147004, 0.240222469, 0.0555071086, 0.00967129227, 0.00132695201};
  constexpr Power() {
    const double floors[] = {1.0, 0.693151295, 0.240164593, 0.0557995178, 0.00901747122, 0.0018669581};
    for (int i = 0; i <= degree && kFloors; ++i) coefficients[i] = Real(floors[i]);
    double taylor = 1.0;  // log(2)^i / i!
    for (int i = 1; i <= degree && !kSingle; ++i) coefficients[i] = Real(taylor *= kLn2 / i);
  }
};

// While one exists, results below the normal numbers are 0 in its thread. Responsibilities of far components are such
// results, and those that are not 0 delay a processor of Intel by over 100 cycles.
struct FlushSubnormals {
#if defined(__SSE__)
  static constexpr unsigned kFlushToZero = 1 << 15;  // bit of the control register of SSE
  const unsigned before = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(before | kFlushToZero); }
  ~FlushSubnormals() { _mm_setcsr(before); }
#endif
};

// Rounds to Real. In vectorized code GCC 12 drops the rounding of double(Real(x)), unless a number is volatile.
inline double rounded(double number) {
  volatile Real result = Real(number);
  return result;
}

// A number in all lanes.
inline V lanes(Real number) { return number - V{}; }

// The sum of all lanes in double, four at a time.
inline double sum_of_lanes(const V& vector) {
  constexpr int group = kLanes < 4 ? kLanes : 4;
  typedef Real Part __attribute__((vector_size(group * sizeof(Real))));
  typedef double Total __attribute__((vector_size(group * sizeof(double))));
  Total total = {};
  for (int lane = 0; lane < kLanes; lane += group) {
    Part part;
    std::memcpy(&part, reinterpret_cast<const Real*>(&vector) + lane, sizeof(part));
    total += __builtin_convertvector(part, Total);
  }
  double result = 0.0;
  for (int i = 0; i < group; ++i) result += total[i];
  return result;
}

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

// The split of a number x <= 1 into a fraction and an integer n.
#if defined(__AVX512DQ__)
class Exponent {
 public:
  // Takes x, and returns the fraction.
  V split(V whole) {
    x = whole;
    if constexpr (kSingle) return (V)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    else return fraction = (V)_mm512_reduce_pd((__m512d)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  // Returns factor 2^n, or 0 below the range of Real. The instructions round exponents down.
  V scale(V factor) const {
    if constexpr (kSingle) return (V)_mm512_scalef_ps((__m512)factor, (__m512)x);
    else return (V)_mm512_scalef_pd((__m512d)factor, (__m512d)(x - fraction));
  }

 private:
  V x, fraction;
};
#else
class Exponent {
 public:
  V split(V x) {
    x = larger(lanes(-bias), x);  // for n = -bias, the scale is 0
    shifted = x + magic;
    return x - (shifted - magic);
  }

  V scale(V factor) const { return factor * (V)((I)shifted << digits); }  // moves n + bias into the exponent

 private:
  static constexpr int digits = kSingle ? 23 : 52;
  static constexpr Real bias = kSingle ? 127 : 1023;
  // Adding it rounds x to an integer n, and the low bits of the sum are n + bias.
  static constexpr Real magic = Real(1.5) * Real(Int(1) << digits) + bias;
  V shifted;
};
#endif

// Replaces each x <= 1 by 2^x. Operations alternate between the vectors, so that the processor need not wait for
// results.
template <int kCount>
inline void exp2(V (&x)[kCount]) {
  constexpr Power series;
  Exponent exponent[kCount];
  V fraction[kCount], power[kCount];
  for (int i = 0; i < kCount; ++i) fraction[i] = exponent[i].split(x[i]);
  for (int i = 0; i < kCount; ++i) power[i] = lanes(series.coefficients[Power::degree]);
  for (int j = Power::degree - 1; j >= 0; --j)
    for (int i = 0; i < kCount; ++i) power[i] = power[i] * fraction[i] + series.coefficients[j];
  for (int i = 0; i < kCount; ++i) x[i] = exponent[i].scale(power[i]);
}

// A mask whose bit i tells whether x of lane i is above a bound or NaN.
inline unsigned lanes_above(V x, Real bound) {
  const I above = ~(x <= bound);
#if defined(__AVX512DQ__)
  if constexpr (kSingle) return _mm512_movepi32_mask((__m512i)above);
  else return _mm512_movepi64_mask((__m512i)above);
#elif defined(__AVX__) && !defined(__AVX512F__)
  if constexpr (kSingle) return _mm256_movemask_ps((__m256)above);
  else return _mm256_movemask_pd((__m256d)above);
#else
  unsigned mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= unsigned(above[lane] & 1) << lane;
  return mask;
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
