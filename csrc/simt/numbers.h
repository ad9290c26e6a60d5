// float16 and bfloat16 with CUDA's names. Arithmetic is that of the hardware: a float operation, rounded once.

#pragma once

#include <cstdint>
#include <cstring>

namespace efficientad_fast::simt {

inline std::uint32_t float_bits(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_from(std::uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// To nearest, halves to even; NaN becomes 0x7fff, as on the device.
inline std::uint16_t half_from_float(float x) {
  const std::uint32_t bits = float_bits(x);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    return 0x7fff;
  }
  if (magnitude >= 0x477ff000) {  // 65520, which rounds to the first power of two that is too large
    return sign | 0x7c00;
  }
  if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24, which this sum rounds to
    const float denormal = float_from(magnitude) + 0.5f;
    return sign | static_cast<std::uint16_t>(float_bits(denormal) - 0x3f000000);
  }
  const std::uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | static_cast<std::uint16_t>((rounded - 0x38000000) >> 13);
}

inline float float_from_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
  const std::uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) {
    return float_from(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  }
  if (magnitude < 0x400) {
    const float denormal = static_cast<float>(magnitude) * 0x1p-24f;
    return sign != 0 ? -denormal : denormal;
  }
  return float_from(sign | ((magnitude << 13) + 0x38000000));
}

inline std::uint16_t bfloat16_from_float(float x) {
  const std::uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    return 0x7fff;
  }
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// To nearest, halves to even; what is beyond 448, the largest number, becomes it, and NaN 0x7f, as on the device.
inline std::uint8_t e4m3_from_float(float x) {
  const std::uint32_t bits = float_bits(x);
  const auto sign = static_cast<std::uint8_t>(bits >> 24 & 0x80);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    return 0x7f;
  }
  if (magnitude >= 0x43e00000) {  // 448
    return sign | 0x7e;
  }
  if (magnitude < 0x3c800000) {  // below 2^-6: a multiple of 2^-9, which this sum rounds to
    const float denormal = float_from(magnitude) + 16384.0f;
    return sign | static_cast<std::uint8_t>(float_bits(denormal) - 0x46800000);
  }
  const std::uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
  return sign | static_cast<std::uint8_t>((rounded - 0x3c000000) >> 20);
}

inline float float_from_e4m3(std::uint8_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x80) << 24;
  const std::uint32_t magnitude = bits & 0x7f;
  if (magnitude == 0x7f) {
    return float_from(sign | 0x7fc00000);
  }
  if (magnitude < 8) {
    const float denormal = static_cast<float>(magnitude) * 0x1p-9f;
    return sign != 0 ? -denormal : denormal;
  }
  return float_from(sign | ((magnitude << 20) + 0x3c000000));
}

inline float float_from_bfloat16(std::uint16_t bits) { return float_from(static_cast<std::uint32_t>(bits) << 16); }

}  // namespace efficientad_fast::simt

#define EFFICIENTAD_FAST_SIMT_NUMBER(Name, Pair, to_float, from_float)                                             \
  struct Name {                                                                                                    \
    std::uint16_t bits;                                                                                            \
    Name() = default;                                                                                              \
    Name(float x) : bits(::efficientad_fast::simt::from_float(x)) {}                                               \
    Name(double x);                                                                                                \
    Name(int x) : Name(static_cast<double>(x)) {}                                                                  \
    operator float() const { return ::efficientad_fast::simt::to_float(bits); }                                    \
    Name& operator+=(Name b) { return *this = Name(float(*this) + float(b)); }                                     \
    Name& operator-=(Name b) { return *this = Name(float(*this) - float(b)); }                                     \
    Name& operator*=(Name b) { return *this = Name(float(*this) * float(b)); }                                     \
    Name& operator/=(Name b) { return *this = Name(float(*this) / float(b)); }                                     \
  };                                                                                                               \
  static_assert(sizeof(Name) == 2);                                                                                \
  /* A float that lies where the double does: between two candidates, odd bits keep it off the halfway point. */   \
  inline Name::Name(double x) {                                                                                    \
    float near = static_cast<float>(x);                                                                            \
    std::uint32_t pattern = ::efficientad_fast::simt::float_bits(near);                                            \
    if (static_cast<double>(near) != x && x == x && (pattern & 1) == 0 && (pattern & 0x7f800000) != 0x7f800000) {  \
      const bool beyond = (near < 0 ? -static_cast<double>(near) : static_cast<double>(near)) > (x < 0 ? -x : x);  \
      near = ::efficientad_fast::simt::float_from(beyond ? pattern - 1 : pattern + 1);                             \
    }                                                                                                              \
    bits = ::efficientad_fast::simt::from_float(near);                                                             \
  }                                                                                                                \
  inline Name operator+(Name a, Name b) { return Name(float(a) + float(b)); }                                      \
  inline Name operator-(Name a, Name b) { return Name(float(a) - float(b)); }                                      \
  inline Name operator*(Name a, Name b) { return Name(float(a) * float(b)); }                                      \
  inline Name operator/(Name a, Name b) { return Name(float(a) / float(b)); }                                      \
  inline Name operator-(Name a) {                                                                                  \
    a.bits ^= 0x8000;                                                                                              \
    return a;                                                                                                      \
  }                                                                                                                \
  inline bool __hisnan(Name x) { return float(x) != float(x); }                                                    \
  inline bool operator==(Name a, Name b) { return float(a) == float(b); }                                          \
  inline bool operator!=(Name a, Name b) { return float(a) != float(b); }                                          \
  inline bool operator<(Name a, Name b) { return float(a) < float(b); }                                            \
  inline bool operator>(Name a, Name b) { return float(a) > float(b); }                                            \
  inline bool operator<=(Name a, Name b) { return float(a) <= float(b); }                                          \
  inline bool operator>=(Name a, Name b) { return float(a) >= float(b); }                                          \
  /* Of a number and NaN the number, of two zeros the positive one. */                                             \
  inline Name __hmax(Name a, Name b) {                                                                             \
    return __hisnan(b) || (a == b ? (a.bits & 0x8000) == 0 : a > b) ? a : b;                                       \
  }                                                                                                                \
  inline Name __hmin(Name a, Name b) {                                                                             \
    return __hisnan(b) || (a == b ? (a.bits & 0x8000) != 0 : a < b) ? a : b;                                       \
  }                                                                                                                \
  struct alignas(4) Pair {                                                                                         \
    Name x, y;                                                                                                     \
  };                                                                                                               \
  inline Pair __hadd2(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }                                           \
  inline Pair __hsub2(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }                                           \
  inline Pair __hmul2(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }                                           \
  inline Pair __hmax2(Pair a, Pair b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                             \
  inline Pair __hmin2(Pair a, Pair b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }

EFFICIENTAD_FAST_SIMT_NUMBER(__half, __half2, float_from_half, half_from_float)
EFFICIENTAD_FAST_SIMT_NUMBER(__nv_bfloat16, __nv_bfloat162, float_from_bfloat16, bfloat16_from_float)
#undef EFFICIENTAD_FAST_SIMT_NUMBER

using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half __double2half(double x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __float2half2_rn(float x) { return {x, x}; }
inline __half __low2half(__half2 pair) { return pair.x; }
inline __half __high2half(__half2 pair) { return pair.y; }
inline float __low2float(__half2 pair) { return pair.x; }
inline float __high2float(__half2 pair) { return pair.y; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits = bits;
  return x;
}

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat16 __double2bfloat16(double x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {x, x}; }
inline float __low2float(__nv_bfloat162 pair) { return pair.x; }
inline float __high2float(__nv_bfloat162 pair) { return pair.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 x;
  x.bits = bits;
  return x;
}
