// Vectors of float or double, for native.cpp.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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
// Points of a block: more for wide full covariances, whose whitening costs most.
constexpr bool kWide = KIND == 0 && FEATURES > 6;
constexpr int kBlockPoints = !kWide ? 128 : (FEATURES <= 24 ? 512 : 256);
constexpr int kSteps = kBlockPoints / kLanes;  // vectors per feature of a block
constexpr int kBlocksPerSum = 4;        // blocks that are added up in Real, before they are added in double
constexpr int64_t kRowsPerTask = 2048;  // fixed, so that results do not depend on the number of threads
constexpr Real kNegligible = kSingle ? 1e-20 : 1e-60;  // smaller responsibilities change no sum
constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// 2^x on [-1/2, 1/2]: the polynomial of least relative error, 8e-8, or Taylor's series, of error 5e-18.
struct Power {
  static constexpr int degree = kSingle ? 5 : 13;
  Real coefficients[14] = {1.0, 0.693146944, 0.240221202, 0.0555071309, 0.00967554096, 0.00132764713};
  constexpr Power() {
    double taylor = 1.0;  // log(2)^i / i!
    for (int i = 1; i <= degree && !kSingle; ++i) coefficients[i] = Real(taylor *= kLn2 / i);
  }
};

// 2^x for x <= 0; 0 below the range of Real.
inline V exp2(V x) {
  constexpr int digits = kSingle ? 23 : 52;
  constexpr Real bias = kSingle ? 127 : 1023;
  constexpr Real magic = Real(1.5) * Real(Int(1) << digits) + bias;  // adding it rounds to an integer
  const V shifted = x + magic;
  const V fraction = x - (shifted - magic);
  constexpr Power series;
  V power = V{} + series.coefficients[Power::degree];
  for (int i = Power::degree - 1; i >= 0; --i) power = power * fraction + series.coefficients[i];
  const V scale = (V)((I)shifted << digits);
  return x < Real(1 - bias) ? V{} : power * scale;
}

// log2(x) for x >= 1.
inline V log2(V x) {
  constexpr int digits = kSingle ? 23 : 52;
  constexpr Int root = kSingle ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcdLL);  // the bits of sqrt(1/2)
  const I exponent = ((I)x - root) >> digits;
  const V mantissa = (V)((I)x - (exponent << digits));
  const V ratio = (mantissa - Real(1)) / (mantissa + Real(1)), square = ratio * ratio;
  constexpr int terms = kSingle ? 5 : 11;
  V series = V{} + Real(1.0 / (2 * terms - 1));
  for (int i = terms - 2; i >= 0; --i) series = series * square + Real(1.0 / (2 * i + 1));
  return Real(2 * kLog2e) * ratio * series + __builtin_convertvector(exponent, V) + (x - x);  // NaN stays NaN
}

}  // namespace
