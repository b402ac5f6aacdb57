// Products of many tokens with weight rows on CPU: tokens stand side by side in lanes, weights are read where they lie.
//
// A task is some tokens and some weight rows, which pass through the caches in blocks of inputs. Every (token, row) has
// one sum, in the order of the inputs: a result never depends on batch mates, on threads, or on where chunks are cut.
//
// bf16 weights are widened to float32, or multiplied as they are, in pairs of inputs, with tokens rounded likewise.
#pragma once
#include <algorithm>

#include "linear.h"
#include "tiles.h"

namespace farspan {

// What a task works on stays in a core's caches: its tokens of a panel in L1, all of it in L2. Found by trying, with AVX2.
constexpr int64_t BLOCK_INPUTS = 288;
constexpr int64_t TASK_ROWS = 384;
constexpr int64_t TASK_PANELS = 2;
constexpr int64_t TASK_TOKENS = TASK_PANELS * PANEL;
static_assert(BLOCK_INPUTS % LANES == 0 && TASK_ROWS % TILE == 0 && TASK_ROWS % LANES == 0);

template <typename Weight>
class ManyTokens {
 public:
  using Factor = std::conditional_t<IN_BF16<Weight>, int32_t, float>;  // what is multiplied: a pair of inputs, or one

  explicit ManyTokens(const LinearCall& call)
      : call_(call),
        inputs_(TASK_PANELS * BLOCK_INPUTS / STEP * PANEL),
        sums_(TASK_PANELS * TASK_ROWS * PANEL),
        copied_((LIES_READY ? TILE : TASK_ROWS) * BLOCK_INPUTS / STEP) {}

  // The products of tokens [token, token + num_tokens) with rows [row, row + num_rows).
  void run(int64_t token, int64_t num_tokens, int64_t row, int64_t num_rows) {
    const int64_t num_panels = (num_tokens + PANEL - 1) / PANEL;
    for (int64_t input = 0; input < call_.num_inputs; input += BLOCK_INPUTS) {
      const int64_t num_inputs = std::min(BLOCK_INPUTS, call_.num_inputs - input);
      const Rows weights = weights_at(row, num_rows, input, num_inputs);
      for (int64_t panel = 0; panel < num_panels; ++panel) {
        const int64_t first = panel * PANEL, count = std::min<int64_t>(PANEL, num_tokens - first);
        Factor* inputs = &inputs_[panel * BLOCK_INPUTS / STEP * PANEL];
        float* sums = &sums_[panel * TASK_ROWS * PANEL];
        const float* x = call_.x + (token + first) * call_.num_inputs + input;
        switch ((count + LANES - 1) / LANES) {
          case 3: add<3>(x, count, weights, num_rows, num_inputs, input > 0, inputs, sums); break;
          case 2: add<2>(x, count, weights, num_rows, num_inputs, input > 0, inputs, sums); break;
          default: add<1>(x, count, weights, num_rows, num_inputs, input > 0, inputs, sums);
        }
      }
    }
    for (int64_t panel = 0; panel < num_panels; ++panel) {
      const int64_t first = panel * PANEL, count = std::min<int64_t>(PANEL, num_tokens - first);
      const int64_t width = (count + LANES - 1) / LANES * LANES;
      for (int64_t lane = 0; lane < width; lane += LANES)
        write(&sums_[panel * TASK_ROWS * PANEL + lane], width, token + first + lane,
              std::min<int64_t>(LANES, count - lane), row, num_rows);
    }
  }

 private:
  static constexpr int64_t STEP = IN_BF16<Weight> ? 2 : 1;  // inputs of a factor
  static constexpr bool LIES_READY = IN_BF16<Weight> || std::is_same_v<Weight, float>;

  // Weights of inputs [input, input + num_inputs) as factors, [rows][.]: where they lie, or widened.
  struct Rows {
    const Factor* whole;  // tiles of them
    int64_t stride;
    const Factor* rest;  // one tile, its rows num_inputs / STEP apart, zeros behind the last one
  };

  Rows weights_at(int64_t row, int64_t num_rows, int64_t input, int64_t num_inputs) {
    const Weight* weights = static_cast<const Weight*>(call_.weight) + row * call_.num_inputs + input;
    const int64_t num_whole = num_rows / TILE * TILE, stride = num_inputs / STEP;
    const int64_t first = LIES_READY ? num_whole : 0;  // that is copied
    for (int64_t i = first; i < num_rows; ++i) {
      const Weight* from = weights + i * call_.num_inputs;
      Factor* to = &copied_[(i - first) * stride];
      if constexpr (IN_BF16<Weight>)
        std::memcpy(to, from, num_inputs * sizeof(Weight));
      else
        for (int64_t k = 0; k < num_inputs; k += LANES) store(to + k, load(from + k));
    }
    if (num_whole < num_rows)
      std::fill(&copied_[(num_rows - first) * stride], &copied_[(num_whole - first + TILE) * stride], Factor{0});
    const Factor* rest = &copied_[(num_whole - first) * stride];
    if constexpr (LIES_READY)
      return {reinterpret_cast<const Factor*>(weights), call_.num_inputs / STEP, rest};
    else
      return {&copied_[0], stride, rest};
  }

  // Adds what these inputs of a panel's tokens contribute. inputs [.][width] is where they are laid, sums [rows][width].
  template <int VECTORS>
  void add(const float* x, int64_t count, const Rows& weights, int64_t num_rows, int64_t num_inputs, bool goes_on,
           Factor* inputs, float* sums) {
    constexpr int WIDTH = VECTORS * LANES;
    for (int lane = 0; lane < WIDTH; lane += LANES)
      for (int64_t k = 0; k < num_inputs; k += LANES) {
        Floats block[LANES] = {};
        for (int i = 0; i < std::min<int64_t>(LANES, count - lane); ++i)
          block[i] = load(x + (lane + i) * call_.num_inputs + k);
        transpose(block);
        Factor* to = inputs + k / STEP * WIDTH + lane;
        if constexpr (IN_BF16<Weight>)
          for (int i = 0; i < LANES; i += 2) store(to + i / 2 * WIDTH, pair_of_bf16(block[i], block[i + 1]));
        else
          for (int i = 0; i < LANES; ++i) store(to + i * WIDTH, block[i]);
      }
    goes_on ? add_rows<VECTORS, true>(weights, num_rows, num_inputs / STEP, inputs, sums)
            : add_rows<VECTORS, false>(weights, num_rows, num_inputs / STEP, inputs, sums);
  }

  template <int VECTORS, bool ADD>
  void add_rows(const Rows& weights, int64_t num_rows, int64_t num_factors, const Factor* inputs, float* sums) {
    constexpr int WIDTH = VECTORS * LANES;
    int64_t row = 0;
    for (; row + TILE <= num_rows; row += TILE)
      multiply<TILE, VECTORS, ADD>(weights.whole + row * weights.stride, weights.stride, 1, inputs, sums + row * WIDTH,
                                   num_factors);
    if (row < num_rows)
      multiply<TILE, VECTORS, ADD>(weights.rest, num_factors, 1, inputs, sums + row * WIDTH, num_factors);
  }

  // One vector of tokens from sums [rows], `width` floats apart.
  void write(const float* sums, int64_t width, int64_t token, int64_t count, int64_t row, int64_t num_rows) const {
    int64_t i = 0;
    for (; i + LANES <= num_rows; i += LANES) {
      Floats block[LANES];
      for (int j = 0; j < LANES; ++j) block[j] = load(sums + (i + j) * width);
      transpose(block);
      const Floats bias = call_.bias ? load(call_.bias + row + i) : Floats{};
      for (int64_t t = 0; t < count; ++t) store(call_.out + (token + t) * call_.num_outputs + row + i, block[t] + bias);
    }
    for (; i < num_rows; ++i)
      for (int64_t t = 0; t < count; ++t)
        call_.out[(token + t) * call_.num_outputs + row + i] =
            sums[i * width + t] + (call_.bias ? call_.bias[row + i] : 0.0f);
  }

  const LinearCall& call_;
  Buffer<Factor> inputs_;  // per panel [BLOCK_INPUTS / STEP][width]
  Buffer<float> sums_;     // per panel [TASK_ROWS][width]
  Buffer<Factor> copied_;  // [rows][inputs / STEP] of weights that do not lie as they are read
};

template <typename Weight>
void many_tokens(const LinearCall& call) {
  const int64_t num_parts = (call.num_tokens + TASK_TOKENS - 1) / TASK_TOKENS;
  int64_t rows = TASK_ROWS;  // of a task: fewer where threads would find no work
  while (rows > 2 * LANES && num_parts * ((call.num_outputs + rows - 1) / rows) < 4 * call.num_threads) rows /= 2;
  const int64_t num_blocks = (call.num_outputs + rows - 1) / rows;
#pragma omp parallel num_threads(call.num_threads)
  {
    ManyTokens<Weight> worker(call);
#pragma omp for collapse(2) schedule(dynamic) nowait
    for (int64_t part = 0; part < num_parts; ++part)
      for (int64_t block = 0; block < num_blocks; ++block)
        worker.run(part * TASK_TOKENS, std::min<int64_t>(TASK_TOKENS, call.num_tokens - part * TASK_TOKENS),
                   block * rows, std::min(rows, call.num_outputs - block * rows));
  }
}

}  // namespace farspan
