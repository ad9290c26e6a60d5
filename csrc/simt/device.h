// The names of CUDA C++, for a host compiler. Reached through cuda/device.h.

#pragma once

#if !defined(__SANITIZE_THREAD__)
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define EFFICIENTAD_FAST_SIMT_INSTRUMENTED
#endif
#endif
#else
#define EFFICIENTAD_FAST_SIMT_INSTRUMENTED
#endif
#ifndef EFFICIENTAD_FAST_SIMT_INSTRUMENTED
#error "kernels for the emulator are compiled with -fsanitize=thread: without it no access would be seen"
#endif

#include "emulator.h"
#include "numbers.h"

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// A shared variable is a thread-local one of the system thread that runs the block. The guard between it and others has
// an odd size: a variable lies no better aligned than its type promises.
#define EFFICIENTAD_FAST_SIMT_JOIN_(a, b) a##b
#define EFFICIENTAD_FAST_SIMT_JOIN(a, b) EFFICIENTAD_FAST_SIMT_JOIN_(a, b)
#define EFFICIENTAD_FAST_SIMT_GUARD EFFICIENTAD_FAST_SIMT_JOIN(efficientad_fast_simt_guard_, __COUNTER__)
#define __shared__                                                                  \
  static thread_local __attribute__((used)) char EFFICIENTAD_FAST_SIMT_GUARD[1025]; \
  static thread_local __attribute__((used))

// Constant memory is what lies in read-only memory of the library; nobody copies to a symbol.
#define __constant__ const

#define EFFICIENTAD_FAST_DYNAMIC_SHARED(T, name) \
  T* const name = static_cast<T*>(::efficientad_fast::simt::dynamic_shared())

#define threadIdx (::efficientad_fast::simt::thread_index())
#define blockIdx (::efficientad_fast::simt::block_index())
#define blockDim (::efficientad_fast::simt::block_extent())
#define gridDim (::efficientad_fast::simt::grid_extent())
constexpr int warpSize = 32;

using cudaStream_t = void*;
using uint3 = ::efficientad_fast::simt::Index3;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 index) : x(index.x), y(index.y), z(index.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

// Vectors

#define EFFICIENTAD_FAST_SIMT_VECTORS(T, name, bytes2, bytes4)                       \
  struct name##1 {                                                                   \
    T x;                                                                             \
  };                                                                                 \
  struct __align__(bytes2) name##2 {                                                 \
    T x, y;                                                                          \
  };                                                                                 \
  struct name##3 {                                                                   \
    T x, y, z;                                                                       \
  };                                                                                 \
  struct __align__(bytes4) name##4 {                                                 \
    T x, y, z, w;                                                                    \
  };                                                                                 \
  __forceinline__ name##1 make_##name##1(T x) { return {x}; }                        \
  __forceinline__ name##2 make_##name##2(T x, T y) { return {x, y}; }                \
  __forceinline__ name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }        \
  __forceinline__ name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EFFICIENTAD_FAST_SIMT_VECTORS(signed char, char, 2, 4)
EFFICIENTAD_FAST_SIMT_VECTORS(unsigned char, uchar, 2, 4)
EFFICIENTAD_FAST_SIMT_VECTORS(short, short, 4, 8)
EFFICIENTAD_FAST_SIMT_VECTORS(unsigned short, ushort, 4, 8)
EFFICIENTAD_FAST_SIMT_VECTORS(int, int, 8, 16)
EFFICIENTAD_FAST_SIMT_VECTORS(float, float, 8, 16)
EFFICIENTAD_FAST_SIMT_VECTORS(double, double, 16, 16)
EFFICIENTAD_FAST_SIMT_VECTORS(long long, longlong, 16, 16)
EFFICIENTAD_FAST_SIMT_VECTORS(unsigned long long, ulonglong, 16, 16)
#undef EFFICIENTAD_FAST_SIMT_VECTORS
struct uint1 {
  unsigned x;
};
struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
__forceinline__ uint1 make_uint1(unsigned x) { return {x}; }
__forceinline__ uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
__forceinline__ uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
__forceinline__ uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

__forceinline__ float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
__forceinline__ __half2 __float22half2_rn(float2 pair) { return {pair.x, pair.y}; }
__forceinline__ float2 __bfloat1622float2(__nv_bfloat162 pair) { return {pair.x, pair.y}; }
__forceinline__ __nv_bfloat162 __float22bfloat162_rn(float2 pair) { return {pair.x, pair.y}; }

// Barriers and fences

__forceinline__ void __syncthreads() {
  ::efficientad_fast::simt::block_barrier(::efficientad_fast::simt::BlockOperation::kSync, 0);
}
__forceinline__ int __syncthreads_or(int predicate) {
  return ::efficientad_fast::simt::block_barrier(::efficientad_fast::simt::BlockOperation::kOr, predicate);
}
__forceinline__ int __syncthreads_and(int predicate) {
  return ::efficientad_fast::simt::block_barrier(::efficientad_fast::simt::BlockOperation::kAnd, predicate);
}
__forceinline__ int __syncthreads_count(int predicate) {
  return ::efficientad_fast::simt::block_barrier(::efficientad_fast::simt::BlockOperation::kCount, predicate);
}
__forceinline__ void __threadfence() { ::efficientad_fast::simt::fence(); }
__forceinline__ void __threadfence_block() { ::efficientad_fast::simt::fence(); }
__forceinline__ void __threadfence_system() { ::efficientad_fast::simt::fence(); }
[[noreturn]] __forceinline__ void __trap() { ::efficientad_fast::simt::trap(); }

// Warps

__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) {
  ::efficientad_fast::simt::warp_operation(::efficientad_fast::simt::WarpOperation::kSync, mask, 0, 0, 0);
}
// Lanes need not run together, so the caller alone is an answer; who needs more of it asks for too much.
__forceinline__ unsigned __activemask() { return 1u << ::efficientad_fast::simt::lane_index(); }
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(::efficientad_fast::simt::warp_operation(
      ::efficientad_fast::simt::WarpOperation::kBallot, mask, predicate != 0, 0, 0));
}
__forceinline__ int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(::efficientad_fast::simt::warp_operation(::efficientad_fast::simt::WarpOperation::kAny, mask,
                                                                   predicate != 0, 0, 0));
}
__forceinline__ int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(::efficientad_fast::simt::warp_operation(::efficientad_fast::simt::WarpOperation::kAll, mask,
                                                                   predicate != 0, 0, 0));
}

namespace efficientad_fast::simt {

template <typename To, typename From>
__forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits have the same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
__forceinline__ T shuffle(WarpOperation operation, unsigned mask, T value, int argument, int width) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a shuffle moves up to eight plain bytes");
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = warp_operation(operation, mask, bits, argument, width);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace efficientad_fast::simt

template <typename T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
  return ::efficientad_fast::simt::shuffle(::efficientad_fast::simt::WarpOperation::kShuffle, mask, value, lane, width);
}
template <typename T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return ::efficientad_fast::simt::shuffle(::efficientad_fast::simt::WarpOperation::kShuffleUp, mask, value,
                                           static_cast<int>(delta), width);
}
template <typename T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return ::efficientad_fast::simt::shuffle(::efficientad_fast::simt::WarpOperation::kShuffleDown, mask, value,
                                           static_cast<int>(delta), width);
}
template <typename T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  return ::efficientad_fast::simt::shuffle(::efficientad_fast::simt::WarpOperation::kShuffleXor, mask, value, lanes,
                                           width);
}

// Atomics

namespace efficientad_fast::simt {

// Replaces what is at `address` by `update(it)` and returns what was there. All goes through the bits of T, so that the
// compiler's hooks see atomic operations.
template <typename T, typename Update>
__forceinline__ T atomic_update(T* address, const Update& update) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  static_assert(sizeof(T) == sizeof(Bits));
  auto* const place = reinterpret_cast<Bits*>(address);
  Bits before = __atomic_load_n(place, __ATOMIC_RELAXED);
  for (;;) {
    const Bits wanted = bits_as<Bits>(update(bits_as<T>(before)));
    const Bits expected = before;
    if (__atomic_compare_exchange_n(place, &before, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      return bits_as<T>(expected);
    }
  }
}

}  // namespace efficientad_fast::simt

#define EFFICIENTAD_FAST_SIMT_ATOMIC(T, name, expression)                                                    \
  __forceinline__ T name(T* address, T value) {                                                              \
    return ::efficientad_fast::simt::atomic_update(address, [value](T old) -> T { return expression; });      \
  }
#define EFFICIENTAD_FAST_SIMT_ATOMICS(T)                                         \
  EFFICIENTAD_FAST_SIMT_ATOMIC(T, atomicAdd, old + value)                        \
  EFFICIENTAD_FAST_SIMT_ATOMIC(T, atomicMax, old > value ? old : value)          \
  EFFICIENTAD_FAST_SIMT_ATOMIC(T, atomicMin, old < value ? old : value)          \
  EFFICIENTAD_FAST_SIMT_ATOMIC(T, atomicExch, (static_cast<void>(old), value))   \
  EFFICIENTAD_FAST_SIMT_ATOMIC(T, atomicAnd, old & value)                        \
  EFFICIENTAD_FAST_SIMT_ATOMIC(T, atomicOr, old | value)                         \
  EFFICIENTAD_FAST_SIMT_ATOMIC(T, atomicXor, old ^ value)                        \
  __forceinline__ T atomicCAS(T* address, T compare, T value) {                  \
    return ::efficientad_fast::simt::atomic_update(                              \
        address, [compare, value](T old) -> T { return old == compare ? value : old; }); \
  }
EFFICIENTAD_FAST_SIMT_ATOMICS(int)
EFFICIENTAD_FAST_SIMT_ATOMICS(unsigned)
EFFICIENTAD_FAST_SIMT_ATOMICS(unsigned long long)
EFFICIENTAD_FAST_SIMT_ATOMIC(int, atomicSub, old - value)
EFFICIENTAD_FAST_SIMT_ATOMIC(unsigned, atomicSub, old - value)
EFFICIENTAD_FAST_SIMT_ATOMIC(unsigned, atomicInc, old >= value ? 0 : old + 1)
EFFICIENTAD_FAST_SIMT_ATOMIC(unsigned, atomicDec, old == 0 || old > value ? value : old - 1)
EFFICIENTAD_FAST_SIMT_ATOMIC(float, atomicAdd, old + value)
EFFICIENTAD_FAST_SIMT_ATOMIC(float, atomicExch, (static_cast<void>(old), value))
EFFICIENTAD_FAST_SIMT_ATOMIC(double, atomicAdd, old + value)
#undef EFFICIENTAD_FAST_SIMT_ATOMICS
#undef EFFICIENTAD_FAST_SIMT_ATOMIC

// Loads and stores with a wish about caches

#define EFFICIENTAD_FAST_SIMT_LOAD(name)         \
  template <typename T>                          \
  __forceinline__ T name(const T* address) {     \
    return *address;                             \
  }
EFFICIENTAD_FAST_SIMT_LOAD(__ldg)
EFFICIENTAD_FAST_SIMT_LOAD(__ldca)
EFFICIENTAD_FAST_SIMT_LOAD(__ldcg)
EFFICIENTAD_FAST_SIMT_LOAD(__ldcs)
EFFICIENTAD_FAST_SIMT_LOAD(__ldcv)
#undef EFFICIENTAD_FAST_SIMT_LOAD
#define EFFICIENTAD_FAST_SIMT_STORE(name)                                           \
  template <typename T>                                                             \
  __forceinline__ void name(T* address, std::remove_const_t<T> value) {             \
    *address = value;                                                               \
  }
EFFICIENTAD_FAST_SIMT_STORE(__stwb)
EFFICIENTAD_FAST_SIMT_STORE(__stcg)
EFFICIENTAD_FAST_SIMT_STORE(__stcs)
EFFICIENTAD_FAST_SIMT_STORE(__stwt)
#undef EFFICIENTAD_FAST_SIMT_STORE

// Numbers

__forceinline__ int __float_as_int(float x) { return ::efficientad_fast::simt::bits_as<int>(x); }
__forceinline__ float __int_as_float(int x) { return ::efficientad_fast::simt::bits_as<float>(x); }
__forceinline__ unsigned __float_as_uint(float x) { return ::efficientad_fast::simt::bits_as<unsigned>(x); }
__forceinline__ float __uint_as_float(unsigned x) { return ::efficientad_fast::simt::bits_as<float>(x); }
__forceinline__ long long __double_as_longlong(double x) { return ::efficientad_fast::simt::bits_as<long long>(x); }
__forceinline__ double __longlong_as_double(long long x) { return ::efficientad_fast::simt::bits_as<double>(x); }

__forceinline__ float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
__forceinline__ double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fsub_rn(float a, float b) { return a - b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
__forceinline__ double __dadd_rn(double a, double b) { return a + b; }
__forceinline__ double __dsub_rn(double a, double b) { return a - b; }
__forceinline__ double __dmul_rn(double a, double b) { return a * b; }
__forceinline__ double __ddiv_rn(double a, double b) { return a / b; }
__forceinline__ float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
__forceinline__ float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }

// Conversions saturate, and make zero of NaN.
namespace efficientad_fast::simt {

template <typename Integer, typename Real>
__forceinline__ Integer saturated(Real rounded) {
  constexpr Real kBeyond = Real(2) * Real(Integer(1) << (sizeof(Integer) * 8 - 2)) *
                           (std::is_signed_v<Integer> ? Real(1) : Real(2));
  constexpr Integer kLargest = std::is_signed_v<Integer> ? ~(Integer(1) << (sizeof(Integer) * 8 - 1)) : ~Integer(0);
  constexpr Integer kLeast = std::is_signed_v<Integer> ? ~kLargest : Integer(0);
  if (rounded != rounded) {
    return 0;
  }
  return rounded >= kBeyond ? kLargest : rounded <= Real(kLeast) ? kLeast : static_cast<Integer>(rounded);
}

}  // namespace efficientad_fast::simt

#define EFFICIENTAD_FAST_SIMT_CONVERT(Real, real, suffix, Integer, integer)                         \
  __forceinline__ Integer __##real##2##integer##_rn(Real x) {                                       \
    return ::efficientad_fast::simt::saturated<Integer>(__builtin_rint##suffix(x));                 \
  }                                                                                                 \
  __forceinline__ Integer __##real##2##integer##_rz(Real x) {                                       \
    return ::efficientad_fast::simt::saturated<Integer>(__builtin_trunc##suffix(x));                \
  }                                                                                                 \
  __forceinline__ Integer __##real##2##integer##_rd(Real x) {                                       \
    return ::efficientad_fast::simt::saturated<Integer>(__builtin_floor##suffix(x));                \
  }                                                                                                 \
  __forceinline__ Integer __##real##2##integer##_ru(Real x) {                                       \
    return ::efficientad_fast::simt::saturated<Integer>(__builtin_ceil##suffix(x));                 \
  }
EFFICIENTAD_FAST_SIMT_CONVERT(float, float, f, int, int)
EFFICIENTAD_FAST_SIMT_CONVERT(float, float, f, unsigned, uint)
EFFICIENTAD_FAST_SIMT_CONVERT(float, float, f, long long, ll)
EFFICIENTAD_FAST_SIMT_CONVERT(double, double, , int, int)
EFFICIENTAD_FAST_SIMT_CONVERT(double, double, , unsigned, uint)
EFFICIENTAD_FAST_SIMT_CONVERT(double, double, , long long, ll)
#undef EFFICIENTAD_FAST_SIMT_CONVERT
__forceinline__ float __int2float_rn(int x) { return static_cast<float>(x); }
__forceinline__ float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
__forceinline__ float __double2float_rn(double x) { return static_cast<float>(x); }

#define EFFICIENTAD_FAST_SIMT_MINMAX(T)                           \
  __forceinline__ T min(T a, T b) { return b < a ? b : a; }       \
  __forceinline__ T max(T a, T b) { return a < b ? b : a; }
EFFICIENTAD_FAST_SIMT_MINMAX(int)
EFFICIENTAD_FAST_SIMT_MINMAX(unsigned)
EFFICIENTAD_FAST_SIMT_MINMAX(long)
EFFICIENTAD_FAST_SIMT_MINMAX(unsigned long)
EFFICIENTAD_FAST_SIMT_MINMAX(long long)
EFFICIENTAD_FAST_SIMT_MINMAX(unsigned long long)
#undef EFFICIENTAD_FAST_SIMT_MINMAX
// Of a number and NaN, the number.
__forceinline__ float min(float a, float b) { return __builtin_fminf(a, b); }
__forceinline__ float max(float a, float b) { return __builtin_fmaxf(a, b); }
__forceinline__ double min(double a, double b) { return __builtin_fmin(a, b); }
__forceinline__ double max(double a, double b) { return __builtin_fmax(a, b); }
__forceinline__ double min(float a, double b) { return __builtin_fmin(a, b); }
__forceinline__ double max(float a, double b) { return __builtin_fmax(a, b); }
__forceinline__ double min(double a, float b) { return __builtin_fmin(a, b); }
__forceinline__ double max(double a, float b) { return __builtin_fmax(a, b); }
__forceinline__ unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
__forceinline__ unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }
__forceinline__ unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }
__forceinline__ unsigned max(int a, unsigned b) { return max(static_cast<unsigned>(a), b); }

__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ int __ffsll(long long x) { return __builtin_ffsll(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
__forceinline__ int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
__forceinline__ unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) {
    reversed |= (x >> i & 1) << (31 - i);
  }
  return reversed;
}
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
// Byte i of the result is the byte of the eight in `low` and `high` that digit i of `selector` names, or its sign.
__forceinline__ unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned digit = selector >> 4 * i & 0xf, byte = static_cast<unsigned>(bytes >> 8 * (digit & 7)) & 0xff;
    result |= ((digit & 8) == 0 ? byte : (byte & 0x80) != 0 ? 0xffu : 0u) << 8 * i;
  }
  return result;
}
__forceinline__ int __mulhi(int a, int b) { return static_cast<int>(static_cast<long long>(a) * b >> 32); }

// Launches

namespace efficientad_fast::cuda {

// Runs `kernel` in the emulator, to its end. Throws simt::KernelError.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, cudaStream_t,
            Arguments&&... arguments) {
  using Tuple = std::tuple<std::decay_t<Parameters>...>;
  const Tuple values(std::forward<Arguments>(arguments)...);
  const auto invoke = [](const void* function, const void* tuple) {
    std::apply(reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(function)),
               *static_cast<const Tuple*>(tuple));
  };
  simt::run({reinterpret_cast<const void*>(kernel), invoke, &values, sizeof(values), grid, block,
             dynamic_shared_bytes});
}

template <typename... Parameters>
int resident_blocks(void (*)(Parameters...), int, std::size_t) {
  return 2;
}

}  // namespace efficientad_fast::cuda
