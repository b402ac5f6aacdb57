// Vectors of floats as the C++ kernels write them: GCC's vector extensions, one source for AVX2, AVX-512 and NEON.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#ifndef FARSPAN_LANES  // a test may set it, to check on this machine what another one runs
#if defined(__AVX512F__)
#define FARSPAN_LANES 16
#elif defined(__AVX__)
#define FARSPAN_LANES 8
#else
#define FARSPAN_LANES 4
#endif
#endif

namespace farspan {

constexpr int LANES = FARSPAN_LANES;
constexpr int PAGE_SIZE = 64;

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef float LooseFloats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
inline Ints load(const int32_t* from) { return *reinterpret_cast<const LooseInts*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<LooseFloats*>(to) = x; }
inline Floats splat(float x) { return x - Floats{}; }  // x + 0 would turn -0 into 0 and could not be folded

inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__) && FARSPAN_LANES == 16
  return _mm512_max_ps(a, b);
#elif defined(__AVX__) && FARSPAN_LANES == 8
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;  // compiled to a compare and a blend
#endif
}

// The same x, in a register: compilers fold a load into each of its uses, and four loads cost more than one.
inline Floats held(Floats x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX__) && FARSPAN_LANES == 8
  asm("" : "+x"(x));
#endif
  return x;
}

inline bool any(Ints mask) {
  int32_t seen = 0;
  for (int lane = 0; lane < LANES; ++lane) seen |= mask[lane];
  return seen != 0;
}

// 2^x to 1e-7 of itself for x < 128; exactly 0 for x <= -127, -inf included.
inline Floats exp2(Floats x) {
  x = larger(x, splat(-127.0f));
  // 1.5 * 2^23: adding it rounds x to an integer, which then stands in the low bits of the sum.
  const Floats shifted = x + 12582912.0f;
  const Floats rest = x - (shifted - 12582912.0f);  // [-0.5, 0.5]
  // Minimax of (2^f - 1) / f there, found by iteratively reweighted least squares.
  Floats power = 0.001326472731307149f * rest + 0.009671512991189957f;
  power = power * rest + 0.05550733581185341f;
  power = power * rest + 0.24022242426872253f;
  power = power * rest + 0.6931470036506653f;
  power = power * rest + 1.0f;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(power) + (reinterpret_cast<Ints>(shifted) << 23));
}

inline float bf16_to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// To the nearest, ties to even; a NaN stays one.
inline uint16_t float_to_bf16(float x) {
  if (x != x) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void widen(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_float(from[i]);
}

}  // namespace farspan
