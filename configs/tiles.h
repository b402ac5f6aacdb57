// Products in tiles, as the C++ kernels over many rows compute them: rows of one factor stand side by side in lanes.
#include <cstdlib>
#include <memory>

#include "native.h"

namespace farspan {

constexpr int PANEL_VECTORS = 3;  // vectors of rows that are worked on together
constexpr int PANEL = PANEL_VECTORS * LANES;

// Memory that a thread reuses from task to task, aligned for vectors.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : memory_(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 127) / 64 * 64)), std::free) {}
  T& operator[](int64_t i) { return memory_.get()[i]; }
  const T& operator[](int64_t i) const { return memory_.get()[i]; }

 private:
  std::unique_ptr<T, decltype(&std::free)> memory_;
};

// Accumulators of a tile fill the registers: 4 x 3 of 16 with AVX2, 8 x 3 of 32 with AVX-512 and NEON.
constexpr int TILE = LANES == 8 ? 4 : 8;

// c [COUNT][lanes] (+)= sum over k of a(i, k) * b [k][lanes], with a(i, k) = a[i * stride_i + k * stride_k].
template <int COUNT, int VECTORS, bool ADD>
inline void multiply(const float* a, int64_t stride_i, int64_t stride_k, const float* b, float* c, int64_t num_k) {
  Floats sums[COUNT][VECTORS];
  for (int i = 0; i < COUNT; ++i)
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = ADD ? load(c + (i * VECTORS + j) * LANES) : Floats{};
  for (int64_t k = 0; k < num_k; ++k) {
    Floats row[VECTORS];
    for (int j = 0; j < VECTORS; ++j) row[j] = held(load(b + (k * VECTORS + j) * LANES));
    for (int i = 0; i < COUNT; ++i) {
      const Floats factor = splat(a[i * stride_i + k * stride_k]);
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = multiply_add(factor, row[j], sums[i][j]);
    }
  }
  for (int i = 0; i < COUNT; ++i)
    for (int j = 0; j < VECTORS; ++j) store(c + (i * VECTORS + j) * LANES, sums[i][j]);
}

// The same of pairs of bf16: sum over pairs k of a(i, k) and b [k][lanes], each the two products of its halves.
template <int COUNT, int VECTORS, bool ADD>
inline void multiply(const Pair* a, int64_t stride_i, int64_t stride_k, const Pair* b, float* c, int64_t num_k) {
  Floats sums[COUNT][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; ++i)
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = ADD ? load(c + (i * VECTORS + j) * LANES) : Floats{};
  for (int64_t k = 0; k < num_k; ++k) {
    Ints row[VECTORS];
    for (int j = 0; j < VECTORS; ++j) row[j] = load(b + (k * VECTORS + j) * LANES);
    for (int i = 0; i < COUNT; ++i) {
      const Ints factor = Ints{} + a[i * stride_i + k * stride_k];
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = multiply_add(factor, row[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; ++i)
    for (int j = 0; j < VECTORS; ++j) store(c + (i * VECTORS + j) * LANES, sums[i][j]);
}

// The same of bytes in quads that share scales, added to c (or beginning it): codes a(i, k) of weights, 128 higher, and
// signed bytes b [k][lanes], whose sums go from `starts` [lanes] and count a_scales[i * scale_stride] * b_scales [lanes].
template <int COUNT, int VECTORS, bool ADD>
inline void multiply_group(const Quad* a, int64_t stride_i, const float* a_scales, int64_t scale_stride, const Quad* b,
                           const int32_t* starts, const float* b_scales, float* c, int64_t num_k) {
  Ints sums[COUNT][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; ++i)
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = load(starts + j * LANES);
  for (int64_t k = 0; k < num_k; ++k) {
    Ints row[VECTORS];
    for (int j = 0; j < VECTORS; ++j) row[j] = load(b + (k * VECTORS + j) * LANES);
    for (int i = 0; i < COUNT; ++i) {
      const Ints factor = Ints{} + a[i * stride_i + k];
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = multiply_add_bytes(factor, row[j], sums[i][j]);
    }
  }
  Floats scales[VECTORS];
  for (int j = 0; j < VECTORS; ++j) scales[j] = load(b_scales + j * LANES);
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; ++i)
    for (int j = 0; j < VECTORS; ++j) {
      float* to = c + (i * VECTORS + j) * LANES;
      const Floats product = __builtin_convertvector(sums[i][j], Floats) * splat(a_scales[i * scale_stride]);
      store(to, ADD ? multiply_add(product, scales[j], load(to)) : product * scales[j]);
    }
}

}  // namespace farspan
