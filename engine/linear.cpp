// Linear layers over a few tokens on CPU, as decode needs them: bound by reading the weights once.
//
// Each weight row is read once for all tokens, and threads share the weight rows. Every (token, row) has a sum of its
// own, added up in the same order however many tokens come along: a result never depends on batch mates or threads.
// Weights are float32, or bf16 that is widened as it is read: half the bytes.
#include <algorithm>
#include <cmath>

#include "native.h"

namespace {

using namespace farspan;

constexpr int TOKENS = 4;  // with
constexpr int ROWS = 2;    // weight rows: 4 x 2 sums, 2 vectors of weights and one of x fit the registers of AVX2
// Bytes ahead that weights are asked for: processors stop looking ahead where a page of memory ends.
constexpr int AHEAD = 4096;

}  // namespace

extern "C" struct LinearCall {  // mirrored in linear.py
  const float* x;               // [num_tokens][num_inputs]
  const void* weight;           // [num_outputs][num_inputs]
  const void* gate;             // as weight, or null: then out = silu(x . gate) * (x . weight), without bias
  const float* bias;            // [num_outputs], or null
  float* out;                   // [num_tokens][num_outputs]
  int64_t num_tokens, num_inputs, num_outputs;  // num_inputs: whole vectors; num_outputs: at least ROWS
  int32_t num_threads;
  int32_t bf16;  // weight and gate are; else float32
};

namespace {

// sums [TOKEN_COUNT][ROWS] of tokens and rows of weights.
template <int TOKEN_COUNT, typename Weight>
inline void products(const LinearCall& call, int64_t token, const Weight* const* rows,
                     float (&result)[TOKEN_COUNT][ROWS]) {
  const float* x = call.x + token * call.num_inputs;
  Floats sums[TOKEN_COUNT][ROWS];
  for (int t = 0; t < TOKEN_COUNT; ++t)
    for (int r = 0; r < ROWS; ++r) sums[t][r] = Floats{};
  for (int64_t i = 0; i < call.num_inputs; i += LANES) {
    Floats weights[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      weights[r] = load(rows[r] + i);
      __builtin_prefetch(reinterpret_cast<const char*>(rows[r] + i) + AHEAD);
    }
    for (int t = 0; t < TOKEN_COUNT; ++t) {
      const Floats inputs = held(load(x + t * call.num_inputs + i));
      for (int r = 0; r < ROWS; ++r) sums[t][r] += inputs * weights[r];
    }
  }
  for (int t = 0; t < TOKEN_COUNT; ++t)
    for (int r = 0; r < ROWS; ++r) result[t][r] = sum_of(sums[t][r]);
}

// ROWS outputs of TOKEN_COUNT tokens.
template <int TOKEN_COUNT, typename Weight>
inline void outputs(const LinearCall& call, int64_t token, int64_t row) {
  const Weight* rows[ROWS];
  for (int r = 0; r < ROWS; ++r) rows[r] = static_cast<const Weight*>(call.weight) + (row + r) * call.num_inputs;
  float result[TOKEN_COUNT][ROWS];
  products<TOKEN_COUNT, Weight>(call, token, rows, result);
  for (int t = 0; t < TOKEN_COUNT; ++t)
    for (int r = 0; r < ROWS; ++r)
      call.out[(token + t) * call.num_outputs + row + r] = result[t][r] + (call.bias ? call.bias[row + r] : 0.0f);
}

// One output of TOKEN_COUNT tokens.
template <int TOKEN_COUNT, typename Weight>
inline void gated(const LinearCall& call, int64_t token, int64_t row) {
  const Weight* rows[ROWS] = {static_cast<const Weight*>(call.gate) + row * call.num_inputs,
                              static_cast<const Weight*>(call.weight) + row * call.num_inputs};
  float result[TOKEN_COUNT][ROWS];
  products<TOKEN_COUNT, Weight>(call, token, rows, result);
  for (int t = 0; t < TOKEN_COUNT; ++t)
    call.out[(token + t) * call.num_outputs + row] = result[t][0] / (1.0f + std::exp(-result[t][0])) * result[t][1];
}

template <int TOKEN_COUNT, typename Weight>
inline void some_tokens(const LinearCall& call, int64_t token, int64_t row) {
  call.gate ? gated<TOKEN_COUNT, Weight>(call, token, row) : outputs<TOKEN_COUNT, Weight>(call, token, row);
}

template <typename Weight>
inline void all_tokens(const LinearCall& call, int64_t row) {
  int64_t token = 0;
  for (; token + TOKENS <= call.num_tokens; token += TOKENS) some_tokens<TOKENS, Weight>(call, token, row);
  switch (call.num_tokens - token) {
    case 3: return some_tokens<3, Weight>(call, token, row);
    case 2: return some_tokens<2, Weight>(call, token, row);
    case 1: return some_tokens<1, Weight>(call, token, row);
  }
}

template <typename Weight>
void run(const LinearCall& call) {
  if (call.gate) {
#pragma omp parallel for schedule(static) num_threads(call.num_threads)
    for (int64_t row = 0; row < call.num_outputs; ++row) all_tokens<Weight>(call, row);
    return;
  }
  const int64_t pairs = call.num_outputs / ROWS;
#pragma omp parallel for schedule(static) num_threads(call.num_threads)
  for (int64_t pair = 0; pair < pairs; ++pair) all_tokens<Weight>(call, pair * ROWS);
  if (call.num_outputs % ROWS) all_tokens<Weight>(call, call.num_outputs - ROWS);  // some again, to the same values
}

}  // namespace

extern "C" int32_t farspan_lanes() { return LANES; }

extern "C" void farspan_linear(const LinearCall* call) { call->bf16 ? run<uint16_t>(*call) : run<float>(*call); }
