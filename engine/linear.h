// Products of a few tokens with weight rows on CPU: what linear.cpp and decode_layers.cpp share among their threads.
//
// Each weight row is read once for all tokens, and threads share the weight rows. Every (token, row) has a sum of its
// own, added up in the same order however many tokens come along: a result never depends on batch mates or threads.
// Weights are float32, or bf16, half the bytes: widened as it is read, or multiplied with tokens that are rounded to it.
// Or they are codes of 8 bits, a quarter: GROUP of a row share a scale, and so do GROUP inputs of a token, which become
// codes, too. Sums of a group are exact. Groups of both are rotated before they become codes, which leaves their products
// as they are and spreads outliers (Ashkboos et al., 2024, "QuaRot").
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
constexpr int64_t GROUP = 64;  // mirrored in linear.py

// What weights are, and what becomes of them.
enum Weights : int32_t { FLOAT32, BF16_WIDENED, BF16_MULTIPLIED, INT8 };

struct LinearCall {       // mirrored in linear.py
  const float* x;         // [num_tokens][num_inputs]
  const void* weight;     // [num_outputs][num_inputs]
  const void* gate;       // as weight, or null: then out = silu(x . gate) * (x . weight), without bias
  const float* scales;    // [num_outputs][num_inputs / GROUP] of weight, where it is codes
  const float* gate_scales;
  const float* bias;      // [num_outputs], or null
  const float* residual;  // [num_tokens][num_outputs], or null: then out = residual + share * (x . weight + bias)
  float* out;             // [num_tokens][num_outputs]
  void* prepared;         // prepared_bytes of room for x as it is multiplied
  int64_t num_tokens, num_inputs, num_outputs;  // num_inputs: whole vectors, or GROUPs; num_outputs: at least ROWS
  int32_t num_threads;
  int32_t weights;        // Weights; for BF16_MULTIPLIED and few tokens, num_inputs is pairs of vectors
  float share;
};

template <typename Weight>
constexpr bool IN_BF16 = std::is_same_v<Weight, Bf16>;

template <typename Weight>
constexpr bool IN_CODES = std::is_same_v<Weight, Code>;

// Inputs that an iteration multiplies.
template <typename Weight>
constexpr int64_t AT_ONCE = IN_CODES<Weight> ? GROUP : IN_BF16<Weight> ? 2 * LANES : LANES;

// Lane i holds x[i] + x[i ^ bit] or, where i has the bit, x[i ^ bit] - x[i]: a round of rotate() inside a vector.
template <int BIT>
inline Floats add_neighbours(Floats x) {
  Ints neighbour;
  Floats sign;
  for (int lane = 0; lane < LANES; ++lane) {
    neighbour[lane] = lane ^ BIT;
    sign[lane] = lane & BIT ? -1.0f : 1.0f;
  }
  return multiply_add(x, sign, __builtin_shuffle(x, neighbour));
}

// A group times Sylvester's Hadamard matrix of that order over its square root, as engine/weights.py has it.
inline void rotate(Floats (&x)[GROUP / LANES]) {
  static_assert(GROUP == 64);  // the root: 8
  for (Floats& part : x) {
    part = add_neighbours<1>(add_neighbours<2>(part * 0.125f));
    if constexpr (LANES > 4) part = add_neighbours<4>(part);
    if constexpr (LANES > 8) part = add_neighbours<8>(part);
  }
  for (int64_t bit = 1; bit < GROUP / LANES; bit *= 2)
    for (int64_t i = 0; i < GROUP / LANES; ++i) {
      if (i & bit) continue;
      const Floats sum = x[i] + x[i + bit];
      x[i + bit] = x[i] - x[i + bit];
      x[i] = sum;
    }
}

// Tokens as codes, where `prepared` has them.
struct CodedInputs {
  int8_t* codes;    // [num_tokens][num_inputs]
  float* scales;    // [num_tokens][num_groups]
  int32_t* starts;  // [num_tokens][num_groups]: minus what products with codes of weights are too large by
  int64_t num_inputs, num_groups;

  explicit CodedInputs(const LinearCall& call)
      : codes(static_cast<int8_t*>(call.prepared)),
        scales(reinterpret_cast<float*>(codes + call.num_tokens * call.num_inputs)),
        starts(reinterpret_cast<int32_t*>(scales + call.num_tokens * call.num_inputs / GROUP)),
        num_inputs(call.num_inputs),
        num_groups(call.num_inputs / GROUP) {}

  // One token, the largest element of each rotated group exactly.
  void encode(const float* x, int64_t token) const {
    for (int64_t group = 0; group < num_groups; ++group, x += GROUP) {
      Floats rotated[GROUP / LANES], largest = {};
      for (int64_t i = 0; i < GROUP / LANES; ++i) rotated[i] = load(x + i * LANES);
      rotate(rotated);
      for (const Floats part : rotated) largest = larger(largest, larger(part, -part));
      const float scale = largest_of(largest) / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
      int8_t* to = codes + token * num_inputs + group * GROUP;
      Ints sum = {};
      for (int64_t i = 0; i < GROUP / LANES; ++i) {
        const Ints code = rounded(rotated[i] * inverse);
        sum += code;
        store(to + i * LANES, code);
      }
      scales[token * num_groups + group] = scale;
      const float total = sum_of(__builtin_convertvector(sum, Floats));  // exactly
      starts[token * num_groups + group] = -CODE_ZERO * static_cast<int32_t>(total);
    }
  }
};

template <typename Weight>
inline size_t prepared_bytes(int64_t num_tokens, int64_t num_inputs) {
  if (IN_CODES<Weight>) return num_tokens * (num_inputs + num_inputs / GROUP * 2 * sizeof(float));
  return IN_BF16<Weight> ? num_tokens * num_inputs * sizeof(uint16_t) : 0;
}

// Before few tokens are multiplied with weights that are not widened.
template <typename Weight>
inline void prepare(const LinearCall& call) {
  if constexpr (IN_CODES<Weight>)
    for (int64_t token = 0; token < call.num_tokens; ++token)
      CodedInputs(call).encode(call.x + token * call.num_inputs, token);
  if constexpr (IN_BF16<Weight>) {
    uint16_t* to = static_cast<uint16_t*>(call.prepared);
    for (int64_t i = 0; i < call.num_tokens * call.num_inputs; i += LANES) store(to + i, load(call.x + i));
  }
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

// ROWS rows of weights, with their scales where they are codes.
template <typename Weight>
struct Rows {
  const Weight* weights[ROWS];
  const float* scales[ROWS];
};

template <typename Weight>
inline Rows<Weight> rows_at(const LinearCall& call, int64_t row) {
  const int64_t num_groups = call.num_inputs / GROUP;
  const auto weight = [&](const void* of, int64_t at) { return static_cast<const Weight*>(of) + at * call.num_inputs; };
  const auto scales = [&](const float* of, int64_t at) { return of ? of + at * num_groups : nullptr; };
  if (call.gate)
    return {{weight(call.gate, row), weight(call.weight, row)},
            {scales(call.gate_scales, row), scales(call.scales, row)}};
  return {{weight(call.weight, row), weight(call.weight, row + 1)},
          {scales(call.scales, row), scales(call.scales, row + 1)}};
}

// result [TOKEN_COUNT][ROWS]: the sums of tokens and rows of weights.
template <int TOKEN_COUNT, typename Weight>
inline void products(const LinearCall& call, const Later& later, int64_t token, const Rows<Weight>& rows,
                     float (&result)[TOKEN_COUNT][ROWS]) {
  static_assert(ROWS == 2);
  // Iterations ask in turn: a gate's rows lie apart, others one behind another.
  const int64_t asked = later.by + token / TOKENS * (call.gate ? later.part / ROWS : later.part);
  const int64_t stride = call.gate ? later.stride : ROWS * later.stride;
  const char* next = reinterpret_cast<const char*>(rows.weights[0]) + asked;
  const char* other = call.gate ? reinterpret_cast<const char*>(rows.weights[1]) + asked : next + later.stride;
  Floats sums[TOKEN_COUNT][ROWS];
  for (int t = 0; t < TOKEN_COUNT; ++t)
    for (int r = 0; r < ROWS; ++r) sums[t][r] = Floats{};
  for (int64_t i = 0; i < call.num_inputs; i += AT_ONCE<Weight>) {
    __builtin_prefetch(next, 0, CLOSENESS);
    if constexpr (ROWS * AT_ONCE<Weight> * sizeof(Weight) > LINE) __builtin_prefetch(next + LINE, 0, CLOSENESS);
    next += stride;
    std::swap(next, other);
    const int64_t first = token * call.num_inputs + i;
    if constexpr (IN_CODES<Weight>) {
      constexpr int VECTORS = GROUP / sizeof(Ints);
      const CodedInputs coded(call);
      Ints weights[ROWS][VECTORS];
      Floats scales[ROWS];
      for (int r = 0; r < ROWS; ++r) scales[r] = splat(rows.scales[r][i / GROUP]);
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v)
          weights[r][v] = load(reinterpret_cast<const Quad*>(rows.weights[r] + i) + v * LANES);
      for (int t = 0; t < TOKEN_COUNT; ++t) {
        const Quad* inputs = reinterpret_cast<const Quad*>(coded.codes + first + t * call.num_inputs);
        const int64_t group = (token + t) * coded.num_groups + i / GROUP;
        for (int r = 0; r < ROWS; ++r) {
          Ints sum = {coded.starts[group]};
          for (int v = 0; v < VECTORS; ++v) sum = multiply_add_bytes(weights[r][v], load(inputs + v * LANES), sum);
          const Floats scale = splat(coded.scales[group]) * scales[r];
          sums[t][r] = multiply_add(__builtin_convertvector(sum, Floats), scale, sums[t][r]);
        }
      }
    } else if constexpr (IN_BF16<Weight>) {
      const uint16_t* rounded = static_cast<const uint16_t*>(call.prepared) + first;
      Ints weights[ROWS];
      for (int r = 0; r < ROWS; ++r) weights[r] = load(reinterpret_cast<const Pair*>(rows.weights[r] + i));
      for (int t = 0; t < TOKEN_COUNT; ++t) {
        const Ints inputs = load(reinterpret_cast<const Pair*>(rounded + t * call.num_inputs));
        for (int r = 0; r < ROWS; ++r) sums[t][r] = multiply_add(inputs, weights[r], sums[t][r]);
      }
    } else {
      Floats weights[ROWS];
      for (int r = 0; r < ROWS; ++r) weights[r] = held(load(rows.weights[r] + i));
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
  float result[TOKEN_COUNT][ROWS];
  products<TOKEN_COUNT, Weight>(call, later, token, rows_at<Weight>(call, row), result);
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
  float result[TOKEN_COUNT][ROWS];
  products<TOKEN_COUNT, Weight>(call, later, token, rows_at<Weight>(call, row), result);
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
