// Products of a few tokens with weight rows on CPU: what linear.cpp and decode_layers.cpp share among their threads.
//
// Each weight row is read once for all tokens, and threads share the weight rows. Every (token, row) has a sum of its
// own, added up in the same order however many tokens come along: a result never depends on batch mates or threads.
// Weights are float32, or bf16, half the bytes: widened as it is read, or multiplied with tokens that are rounded to it.
#pragma once
#include <cmath>
#include <type_traits>
#include <utility>

#include "native.h"

namespace farspan {

constexpr int TOKENS = 4;  // with
constexpr int ROWS = 2;    // weight rows: 4 x 2 sums, 2 vectors of weights and one of x fit the registers of AVX2
// How many times further on memory is asked for: processors stop looking ahead where a page of memory ends.
constexpr int AHEAD = 2;
// Into which cache: with AVX-512 (Zen 4) L2 gives up to twice the bandwidth that L1 gives.
constexpr int CLOSENESS = LANES == 16 ? 2 : 3;
constexpr int64_t LINE = 64;  // bytes

// What weights are, and what becomes of them.
enum Weights : int32_t { FLOAT32, BF16_WIDENED, BF16_MULTIPLIED };

struct LinearCall {       // mirrored in linear.py
  const float* x;         // [num_tokens][num_inputs]
  const void* weight;     // [num_outputs][num_inputs]
  const void* gate;       // as weight, or null: then out = silu(x . gate) * (x . weight), without bias
  const float* bias;      // [num_outputs], or null
  const float* residual;  // [num_tokens][num_outputs], or null: then out = residual + share * (x . weight + bias)
  float* out;             // [num_tokens][num_outputs]
  uint16_t* rounded;      // room for x in bf16, of few tokens where it is multiplied
  int64_t num_tokens, num_inputs, num_outputs;  // num_inputs: whole vectors; num_outputs: at least ROWS
  int32_t num_threads;
  int32_t weights;        // Weights; for BF16_MULTIPLIED and few tokens, num_inputs is pairs of vectors
  float share;
};

template <typename Weight>
constexpr bool IN_BF16 = std::is_same_v<Weight, Bf16>;

// Inputs that an iteration multiplies.
template <typename Weight>
constexpr int AT_ONCE = IN_BF16<Weight> ? 2 * LANES : LANES;

// Before few tokens are multiplied in bf16.
inline void round_inputs(const LinearCall& call) {
  for (int64_t i = 0; i < call.num_tokens * call.num_inputs; i += LANES) store(call.rounded + i, load(call.x + i));
}

// What is asked for while ROWS rows are multiplied: as many of later ones. Each group of tokens passes over the same
// rows and asks for an equal part: memory works all the time, not in the first pass only.
struct Later {
  int64_t by;      // bytes from what is at hand to what is asked for
  int64_t part;    // bytes of ROWS rows that one pass asks for
  int64_t stride;  // bytes that an iteration asks for
};

template <typename Weight>
inline Later later(const LinearCall& call) {
  const int64_t num_passes = (call.num_tokens + TOKENS - 1) / TOKENS, vector = AT_ONCE<Weight> * sizeof(Weight);
  const int64_t row = call.num_inputs * sizeof(Weight);
  return {AHEAD * (call.gate ? 1 : ROWS) * row, ROWS * row / num_passes, ROWS * vector / num_passes};
}

// sums [TOKEN_COUNT][ROWS] of tokens and rows of weights.
template <int TOKEN_COUNT, typename Weight>
inline void products(const LinearCall& call, const Later& later, int64_t token, const Weight* const* rows,
                     float (&result)[TOKEN_COUNT][ROWS]) {
  static_assert(ROWS == 2);
  // Iterations ask in turn: a gate's rows lie apart, others one behind another.
  const int64_t asked = later.by + token / TOKENS * (call.gate ? later.part / ROWS : later.part);
  const int64_t stride = call.gate ? later.stride : ROWS * later.stride;
  const char* next = reinterpret_cast<const char*>(rows[0]) + asked;
  const char* other = call.gate ? reinterpret_cast<const char*>(rows[1]) + asked : next + later.stride;
  Floats sums[TOKEN_COUNT][ROWS];
  for (int t = 0; t < TOKEN_COUNT; ++t)
    for (int r = 0; r < ROWS; ++r) sums[t][r] = Floats{};
  for (int64_t i = 0; i < call.num_inputs; i += AT_ONCE<Weight>) {
    __builtin_prefetch(next, 0, CLOSENESS);
    if constexpr (ROWS * AT_ONCE<Weight> * sizeof(Weight) > LINE) __builtin_prefetch(next + LINE, 0, CLOSENESS);
    next += stride;
    std::swap(next, other);
    const int64_t first = token * call.num_inputs + i;
    if constexpr (IN_BF16<Weight>) {
      Ints weights[ROWS];
      for (int r = 0; r < ROWS; ++r) weights[r] = load(reinterpret_cast<const Pair*>(rows[r] + i));
      for (int t = 0; t < TOKEN_COUNT; ++t) {
        const Ints inputs = load(reinterpret_cast<const Pair*>(call.rounded + first + t * call.num_inputs));
        for (int r = 0; r < ROWS; ++r) sums[t][r] = multiply_add(inputs, weights[r], sums[t][r]);
      }
    } else {
      Floats weights[ROWS];
      for (int r = 0; r < ROWS; ++r) weights[r] = held(load(rows[r] + i));
      for (int t = 0; t < TOKEN_COUNT; ++t) {
        const Floats inputs = held(load(call.x + first + t * call.num_inputs));
        for (int r = 0; r < ROWS; ++r) sums[t][r] += inputs * weights[r];
      }
    }
  }
  for (int t = 0; t < TOKEN_COUNT; ++t)
    for (int r = 0; r < ROWS; ++r) result[t][r] = sum_of(sums[t][r]);
}

// ROWS outputs of TOKEN_COUNT tokens.
template <int TOKEN_COUNT, typename Weight>
inline void outputs(const LinearCall& call, const Later& later, int64_t token, int64_t row) {
  const Weight* rows[ROWS];
  for (int r = 0; r < ROWS; ++r) rows[r] = static_cast<const Weight*>(call.weight) + (row + r) * call.num_inputs;
  float result[TOKEN_COUNT][ROWS];
  products<TOKEN_COUNT, Weight>(call, later, token, rows, result);
  for (int t = 0; t < TOKEN_COUNT; ++t)
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = (token + t) * call.num_outputs + row + r;
      const float sum = result[t][r] + (call.bias ? call.bias[row + r] : 0.0f);
      call.out[at] = call.residual ? call.residual[at] + call.share * sum : sum;
    }
}

// One output of TOKEN_COUNT tokens.
template <int TOKEN_COUNT, typename Weight>
inline void gated(const LinearCall& call, const Later& later, int64_t token, int64_t row) {
  const Weight* rows[ROWS] = {static_cast<const Weight*>(call.gate) + row * call.num_inputs,
                              static_cast<const Weight*>(call.weight) + row * call.num_inputs};
  float result[TOKEN_COUNT][ROWS];
  products<TOKEN_COUNT, Weight>(call, later, token, rows, result);
  for (int t = 0; t < TOKEN_COUNT; ++t)
    call.out[(token + t) * call.num_outputs + row] = result[t][0] / (1.0f + std::exp(-result[t][0])) * result[t][1];
}

template <int TOKEN_COUNT, typename Weight>
inline void some_tokens(const LinearCall& call, const Later& later, int64_t token, int64_t row) {
  call.gate ? gated<TOKEN_COUNT, Weight>(call, later, token, row)
            : outputs<TOKEN_COUNT, Weight>(call, later, token, row);
}

template <typename Weight>
inline void all_tokens(const LinearCall& call, const Later& later, int64_t row) {
  int64_t token = 0;
  for (; token + TOKENS <= call.num_tokens; token += TOKENS) some_tokens<TOKENS, Weight>(call, later, token, row);
  switch (call.num_tokens - token) {
    case 3: return some_tokens<3, Weight>(call, later, token, row);
    case 2: return some_tokens<2, Weight>(call, later, token, row);
    case 1: return some_tokens<1, Weight>(call, later, token, row);
  }
}

// A thread's part of the rows, an odd last one left out. For all threads of a team, which do not wait at the end.
template <typename Weight>
void share_rows(const LinearCall& call) {
  const Later soon = later<Weight>(call);
  if (call.gate) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < call.num_outputs; ++row) all_tokens<Weight>(call, soon, row);
    return;
  }
  const int64_t pairs = call.num_outputs / ROWS;
#pragma omp for schedule(static) nowait
  for (int64_t pair = 0; pair < pairs; ++pair) all_tokens<Weight>(call, soon, pair * ROWS);
}

}  // namespace farspan
