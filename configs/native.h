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
typedef uint16_t LooseHalves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef int8_t LooseBytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Pair __attribute__((may_alias));  // two bf16 side by side, the even one in the low half
typedef int32_t Quad __attribute__((may_alias));  // four bytes side by side

inline Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
inline Ints load(const int32_t* from) { return *reinterpret_cast<const LooseInts*>(from); }
// From bf16, widened.
inline Floats load(const uint16_t* from) {
#if defined(__AVX512F__) && FARSPAN_LANES == 16
  const auto halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const Ints bits = reinterpret_cast<Ints>(_mm512_cvtepu16_epi32(halves));
#elif defined(__AVX2__) && FARSPAN_LANES == 8
  const auto halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const Ints bits = reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(halves));
#else
  const Ints bits = __builtin_convertvector(*reinterpret_cast<const LooseHalves*>(from), Ints);  // GCC: by halves
#endif
  return reinterpret_cast<Floats>(bits << 16);
}
// From whole numbers of 8 bits, with their sign.
inline Ints load_bytes(const void* from) {
#if defined(__AVX512F__) && FARSPAN_LANES == 16
  return reinterpret_cast<Ints>(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#elif defined(__AVX2__) && FARSPAN_LANES == 8
  return reinterpret_cast<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(*static_cast<const LooseBytes*>(from), Ints);  // GCC converts one by one with AVX2
#endif
}
inline Floats load(const int8_t* from) { return __builtin_convertvector(load_bytes(from), Floats); }
inline void store(float* to, Floats x) { *reinterpret_cast<LooseFloats*>(to) = x; }
inline void store(int32_t* to, Ints x) { *reinterpret_cast<LooseInts*>(to) = x; }
// The low bytes.
inline void store(int8_t* to, Ints x) {
#if defined(__AVX512F__) && FARSPAN_LANES == 16
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
#else
  *reinterpret_cast<LooseBytes*>(to) = __builtin_convertvector(x, LooseBytes);
#endif
}
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

// a * b + c, rounded once where the processor can: compilers decide that anew at every place, and sums that ought to
// agree to the last bit would not.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__) && FARSPAN_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__) && FARSPAN_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
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

// The nearest whole number, ties to even, of |x| < 2^22: adding 1.5 * 2^23 leaves it in the low bits.
inline Ints rounded(Floats x) {
  return reinterpret_cast<Ints>(x + 12582912.0f) - reinterpret_cast<Ints>(splat(12582912.0f));
}

inline bool any(Ints mask) {
  int32_t seen = 0;
  for (int lane = 0; lane < LANES; ++lane) seen |= mask[lane];
  return seen != 0;
}

inline float sum_of(Floats x) {
#if defined(__AVX512F__) && FARSPAN_LANES == 16
  return _mm512_reduce_add_ps(x);
#elif defined(__AVX__) && FARSPAN_LANES == 8
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  float sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
  return sum;
#endif
}

inline float largest_of(Floats x) {
  float largest = x[0];
  for (int lane = 1; lane < LANES; ++lane) largest = x[lane] > largest ? x[lane] : largest;
  return largest;
}

// x [LANES][LANES] transposed in place: each perfect shuffle of rows i and i + LANES / 2 moves one bit of the row index
// into the column index.
inline void transpose(Floats* x) {
#if FARSPAN_LANES == 16
  const Ints low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr int ROUNDS = 4;
#elif FARSPAN_LANES == 8
  const Ints low = {0, 8, 1, 9, 2, 10, 3, 11};
  constexpr int ROUNDS = 3;
#else
  const Ints low = {0, 4, 1, 5};
  constexpr int ROUNDS = 2;
#endif
  const Ints high = low + LANES / 2;
  Floats y[LANES];
#pragma GCC unroll 4
  for (int round = 0; round < ROUNDS; ++round) {
    for (int i = 0; i < LANES / 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + LANES / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + LANES / 2], high);
    }
    for (int i = 0; i < LANES; ++i) x[i] = y[i];
  }
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

// The same to 1e-4 of itself: enough for what is rounded to bf16 next.
inline Floats exp2_for_bf16(Floats x) {
#if defined(__AVX512F__) && FARSPAN_LANES == 16
  const Floats rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // [0, 1), 0 of -inf
  Floats power = 0.07802444f * rest + 0.22606731f;
  power = power * rest + 0.69583346f;
  power = power * rest + 0.99992523f;
  return _mm512_scalef_ps(power, x);
#else
  return exp2(x);
#endif
}

// tanh(x / 2 * ln(2)) = 1 - 2 / (1 + 2^x), to 1e-7.
inline Floats tanh_of_half(Floats x) {
  x = -larger(-x, splat(-126.0f));
  return 1.0f - 2.0f / (1.0f + exp2(x));
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

// Pairs of bf16, the even one in the low half, rounded as above. Of finite values.
inline Ints pair_of_bf16(Floats even, Floats odd) {
#if defined(__AVX512BF16__) && FARSPAN_LANES == 16
  // The instruction leaves the even ones in front of the odd ones.
  const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const auto halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  return reinterpret_cast<Ints>(_mm512_permutexvar_epi16(in_turn, halves));
#else
  const Ints low = reinterpret_cast<Ints>(even), high = reinterpret_cast<Ints>(odd);
  const Ints rounded_low = low + 0x7fff + ((low >> 16) & 1), rounded_high = high + 0x7fff + ((high >> 16) & 1);
  return ((rounded_low >> 16) & 0xffff) | (rounded_high & ~0xffff);
#endif
}

// To bf16, rounded as above; a NaN stays one.
inline void store(uint16_t* to, Floats x) {
#if defined(__AVX512BF16__) && FARSPAN_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
  const Ints bits = reinterpret_cast<Ints>(x);
  const Ints rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  *reinterpret_cast<LooseHalves*>(to) = __builtin_convertvector(x == x ? rounded : Ints{} + 0x7fc0, LooseHalves);
#endif
}

// sum + a.even * b.even + a.odd * b.odd, lane by lane, of pairs of bf16.
inline Floats multiply_add(Ints a, Ints b, Floats sum) {
#if defined(__AVX512BF16__) && FARSPAN_LANES == 16
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
  sum = multiply_add(reinterpret_cast<Floats>(a << 16), reinterpret_cast<Floats>(b << 16), sum);
  return multiply_add(reinterpret_cast<Floats>(a & ~0xffff), reinterpret_cast<Floats>(b & ~0xffff), sum);
#endif
}

struct Bf16 {  // bf16 that is multiplied as such, not widened first
  uint16_t bits;
};

// sum + the four products of the bytes in each lane: unsigned ones of a, signed ones of b.
inline Ints multiply_add_bytes(Ints a, Ints b, Ints sum) {
#if defined(__AVX512VNNI__) && FARSPAN_LANES == 16
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVXVNNI__) && FARSPAN_LANES == 8
  return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__AVX2__) && FARSPAN_LANES == 8
  // As numbers of 16 bits: every other byte, and those between.
  const auto x = reinterpret_cast<__m256i>(a), y = reinterpret_cast<__m256i>(b);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
  return sum + reinterpret_cast<Ints>(even) + reinterpret_cast<Ints>(odd);
#else
  for (int shift = 0; shift < 32; shift += 8) sum += ((a >> shift) & 255) * ((b << (24 - shift)) >> 24);
  return sum;
#endif
}

// A whole number of 8 bits as multiply_add_bytes takes it: 128 higher, without sign.
struct Code {
  uint8_t bits;
};
constexpr int32_t CODE_ZERO = 128;

inline void widen(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_float(from[i]);
}

// What a page holds, as configs/quantised.py and the pools' dtype have it. Codes mean something with their scales only.
enum PoolType : int32_t { POOL_FP32, POOL_BF16, POOL_INT8, POOL_FP8 };

struct Fp8 {  // e4m3fn, no NaN among codes
  uint8_t bits;
};

template <typename Element>
constexpr bool IS_CODE = false;
template <>
constexpr bool IS_CODE<int8_t> = true;
template <>
constexpr bool IS_CODE<Fp8> = true;

inline float float_of(int8_t code) { return code; }
inline float float_of(Fp8 code) {
  // Exponent and mantissa move to where a float has them, 120 makes up for the difference of the biases. Codes below 8
  // have no leading one.
  const int32_t magnitude = code.bits & 0x7f;
  const int32_t bits = (magnitude << 20) + (120 << 23);
  float normal;
  std::memcpy(&normal, &bits, sizeof normal);
  const float size = magnitude < 8 ? magnitude * 0x1p-9f : normal;
  return code.bits & 0x80 ? -size : size;
}
inline Floats load(const Fp8* from) {
  const Ints bits = load_bytes(from);
  const Ints magnitude = bits & 0x7f;
  const Floats normal = reinterpret_cast<Floats>((magnitude << 20) + (120 << 23));
  const Floats size = magnitude < 8 ? __builtin_convertvector(magnitude, Floats) * 0x1p-9f : normal;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(size) | (bits & static_cast<int32_t>(0x80000000)));
}

// Codes [num_tokens][head_dim] times the scale of each token.
template <typename Code>
inline void widen(const Code* codes, const float* scales, float* to, int64_t num_tokens, int64_t head_dim) {
  for (int64_t token = 0; token < num_tokens; ++token)
    for (int64_t d = token * head_dim; d < (token + 1) * head_dim; ++d) to[d] = float_of(codes[d]) * scales[token];
}

// The same, rounded to bf16.
template <typename Code>
inline void widen(const Code* codes, const float* scales, uint16_t* to, int64_t num_tokens, int64_t head_dim) {
  for (int64_t token = 0; token < num_tokens; ++token)
    for (int64_t d = token * head_dim; d < (token + 1) * head_dim; ++d)
      to[d] = float_to_bf16(float_of(codes[d]) * scales[token]);
}

}  // namespace farspan
