// New keys and values into pages on CPU; into pages of codes quantised token by token, as configs/quantised.py says.
#include <algorithm>
#include <cmath>

#include "native.h"

namespace {

using namespace farspan;

constexpr int64_t WORTH_THREADS = 256;  // tokens: fewer are stored sooner than other threads wake up

}  // namespace

extern "C" struct StoreCall {  // mirrored in cpu_store.py
  const void* tokens[2];       // keys, values: [A][C][D], the last axis contiguous
  void* pools[2];              // [num_pages * PAGE_SIZE][D]
  float* scales[2];            // [num_pages * PAGE_SIZE] of codes, else null
  const int64_t* destinations;  // [A][C]
  int64_t strides[2][2];       // of A and C, in keys and in values
  int64_t num_a, num_c, head_dim;
  int32_t is_bf16, pool_type, num_threads;
};

namespace {

// To the nearest, ties to even: what is added to 1.5 * 2^23 loses its fraction.
inline int32_t rounded(float x) { return static_cast<int32_t>((x + 12582912.0f) - 12582912.0f); }

inline void put(float* to, float x) { *to = x; }

inline void put(uint16_t* to, float x) { *to = float_to_bf16(x); }

inline void put(int8_t* to, float x) { *to = static_cast<int8_t>(rounded(x)); }

inline void put(Fp8* to, float x) {
  const float size = std::abs(x);
  int32_t bits;
  std::memcpy(&bits, &size, sizeof bits);
  // Exponents differ by 120, mantissas by 20 bits; below the least normal code, codes are multiples of 2^-9.
  const int32_t normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  const int32_t code = size < 0x1p-6f ? rounded(size * 512.0f) : normal;
  to->bits = static_cast<uint8_t>(code | (std::signbit(x) ? 0x80 : 0));
}

template <typename Code>
constexpr float LARGEST = 127.0f;
template <>
constexpr float LARGEST<Fp8> = 448.0f;

inline float float_at(const float* from, int64_t d) { return from[d]; }
inline float float_at(const uint16_t* from, int64_t d) { return bf16_to_float(from[d]); }

// One token [D] as codes; gives its scale.
template <typename Code, typename Element>
float quantise(const Element* token, int64_t head_dim, Code* codes) {
  float largest = 0;
  for (int64_t d = 0; d < head_dim; ++d) largest = std::max(largest, std::abs(float_at(token, d)));
  const float scale = largest / LARGEST<Code>;
  const float divisor = std::max(scale, 0x1p-126f);
  for (int64_t d = 0; d < head_dim; ++d) put(codes + d, float_at(token, d) / divisor);
  return scale;
}

template <typename Kept, typename Element>
void run(const StoreCall& call) {
  const int64_t count = call.num_a * call.num_c;
#pragma omp parallel for num_threads(call.num_threads) if (count >= WORTH_THREADS)
  for (int64_t i = 0; i < count; ++i)
    for (int part = 0; part < 2; ++part) {
      const int64_t at = i / call.num_c * call.strides[part][0] + i % call.num_c * call.strides[part][1];
      const int64_t place = call.destinations[i];
      const Element* token = static_cast<const Element*>(call.tokens[part]) + at;
      Kept* to = static_cast<Kept*>(call.pools[part]) + place * call.head_dim;
      if constexpr (IS_CODE<Kept>)
        call.scales[part][place] = quantise(token, call.head_dim, to);
      else
        for (int64_t d = 0; d < call.head_dim; ++d) put(to + d, float_at(token, d));
    }
}

template <typename Kept>
void store_as(const StoreCall& call) {
  call.is_bf16 ? run<Kept, uint16_t>(call) : run<Kept, float>(call);
}

}  // namespace

extern "C" void farspan_store(const StoreCall* call) {
  switch (call->pool_type) {
    case POOL_FP32: return store_as<float>(*call);
    case POOL_INT8: return store_as<int8_t>(*call);
    case POOL_FP8: return store_as<Fp8>(*call);
    default: store_as<uint16_t>(*call);
  }
}
