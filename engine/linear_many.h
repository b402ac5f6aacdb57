// Products of many tokens with weight rows on CPU: tokens stand side by side in lanes, weights are read where they lie.
//
// A task is some tokens and some weight rows, which pass through the caches in blocks of inputs. Every (token, row) has
// one sum, in the order of the inputs: a result never depends on batch mates, on threads, or on where chunks are cut.
//
// bf16 weights are widened to float32, or multiplied as they are, in pairs of inputs, with tokens rounded likewise. Codes
// are multiplied in quads of inputs, with tokens that became codes before.
#pragma once
#include <algorithm>

#include "linear.h"
#include "tiles.h"

namespace farspan {

// What a task works on stays in a core's caches: its tokens of a panel in L1, all of it in L2. Found by trying, with AVX2.
template <typename Weight>
constexpr int64_t BLOCK_INPUTS = IN_CODES<Weight> ? 6 * GROUP : 288;
constexpr int64_t TASK_ROWS = 384;
constexpr int64_t TASK_PANELS = 2;
constexpr int64_t TASK_TOKENS = TASK_PANELS * PANEL;
static_assert(BLOCK_INPUTS<float> % LANES == 0 && TASK_ROWS % TILE == 0 && TASK_ROWS % LANES == 0);

template <typename Weight>
class ManyTokens {
 public:
  explicit ManyTokens(const LinearCall& call)
      : call_(call),
        inputs_(TASK_PANELS * BLOCK / STEP * PANEL),
        scales_(TASK_PANELS * NUM_GROUPS * PANEL),
        starts_(TASK_PANELS * NUM_GROUPS * PANEL),
        sums_(TASK_PANELS * TASK_ROWS * PANEL),
        copied_((LIES_READY ? TILE : TASK_ROWS) * BLOCK / STEP),
        copied_scales_(TILE * NUM_GROUPS) {}

  // The products of tokens [token, token + num_tokens) with rows [row, row + num_rows).
  void run(int64_t token, int64_t num_tokens, int64_t row, int64_t num_rows) {
    const int64_t num_panels = (num_tokens + PANEL - 1) / PANEL;
    for (int64_t input = 0; input < call_.num_inputs; input += BLOCK) {
      const int64_t num_inputs = std::min(BLOCK, call_.num_inputs - input);
      const Rows weights = weights_at(row, num_rows, input, num_inputs);
      for (int64_t panel = 0; panel < num_panels; ++panel) {
        const int64_t first = panel * PANEL, count = std::min<int64_t>(PANEL, num_tokens - first);
        switch ((count + LANES - 1) / LANES) {
          case 3: add<3>(panel, token + first, count, input, num_inputs, weights, num_rows); break;
          case 2: add<2>(panel, token + first, count, input, num_inputs, weights, num_rows); break;
          default: add<1>(panel, token + first, count, input, num_inputs, weights, num_rows);
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
  static constexpr int64_t BLOCK = BLOCK_INPUTS<Weight>;
  static constexpr int64_t NUM_GROUPS = IN_CODES<Weight> ? BLOCK / GROUP : 0;
  static constexpr int64_t STEP = IN_CODES<Weight> ? 4 : IN_BF16<Weight> ? 2 : 1;  // inputs that are multiplied at once
  using Factor = std::conditional_t<STEP == 1, float, int32_t>;                     // all of them
  static constexpr bool LIES_READY = STEP > 1 || std::is_same_v<Weight, float>;

  // Weights of inputs [input, input + num_inputs) as factors, [rows][.]: where they lie, or widened.
  struct Rows {
    const Factor* whole;  // tiles of them
    int64_t stride;
    const Factor* rest;  // one tile, its rows num_inputs / STEP apart, zeros behind the last one
    const float *scales, *rest_scales;  // of codes: call_.num_inputs / GROUP, and NUM_GROUPS apart
  };

  Rows weights_at(int64_t row, int64_t num_rows, int64_t input, int64_t num_inputs) {
    const Weight* weights = static_cast<const Weight*>(call_.weight) + row * call_.num_inputs + input;
    const int64_t num_whole = num_rows / TILE * TILE, stride = num_inputs / STEP;
    const int64_t first = LIES_READY ? num_whole : 0;  // that is copied
    for (int64_t i = first; i < num_rows; ++i) {
      const Weight* from = weights + i * call_.num_inputs;
      Factor* to = &copied_[(i - first) * stride];
      if constexpr (STEP > 1)
        std::memcpy(to, from, num_inputs * sizeof(Weight));
      else
        for (int64_t k = 0; k < num_inputs; k += LANES) store(to + k, load(from + k));
    }
    if (num_whole < num_rows)
      std::fill(&copied_[(num_rows - first) * stride], &copied_[(num_whole - first + TILE) * stride], Factor{0});
    const float* scales = nullptr;
    if constexpr (IN_CODES<Weight>) {
      const int64_t num_groups = call_.num_inputs / GROUP;
      scales = call_.scales + row * num_groups + input / GROUP;
      std::fill_n(&copied_scales_[0], TILE * NUM_GROUPS, 0.0f);
      for (int64_t i = num_whole; i < num_rows; ++i)
        std::copy_n(scales + i * num_groups, num_inputs / GROUP, &copied_scales_[(i - num_whole) * NUM_GROUPS]);
    }
    const Factor* rest = &copied_[(num_whole - first) * stride];
    if constexpr (LIES_READY)
      return {reinterpret_cast<const Factor*>(weights), call_.num_inputs / STEP, rest, scales, &copied_scales_[0]};
    else
      return {&copied_[0], stride, rest, scales, &copied_scales_[0]};
  }

  // Adds what these inputs of a panel's tokens contribute.
  template <int VECTORS>
  void add(int64_t panel, int64_t token, int64_t count, int64_t input, int64_t num_inputs, const Rows& weights,
           int64_t num_rows) {
    const Panel of{&inputs_[panel * BLOCK / STEP * PANEL], &scales_[panel * NUM_GROUPS * PANEL],
                   &starts_[panel * NUM_GROUPS * PANEL], &sums_[panel * TASK_ROWS * PANEL]};
    if constexpr (IN_CODES<Weight>)
      lay_codes<VECTORS>(token, count, input, num_inputs, of);
    else
      lay<VECTORS>(token, count, input, num_inputs, of);
    input > 0 ? add_rows<VECTORS, true>(weights, num_rows, num_inputs, of)
              : add_rows<VECTORS, false>(weights, num_rows, num_inputs, of);
  }

  struct Panel {      // width: lanes of its vectors
    Factor* inputs;   // [num_inputs / STEP][width]
    float* scales;    // [groups][width], of codes
    int32_t* starts;  // [groups][width], of codes: minus what products of codes are too large by
    float* sums;      // [rows][width]
  };

  template <int VECTORS>
  void lay(int64_t token, int64_t count, int64_t input, int64_t num_inputs, const Panel& panel) {
    constexpr int WIDTH = VECTORS * LANES;
    for (int lane = 0; lane < WIDTH; lane += LANES)
      for (int64_t k = 0; k < num_inputs; k += LANES) {
        Floats block[LANES] = {};
        for (int i = 0; i < std::min<int64_t>(LANES, count - lane); ++i)
          block[i] = load(call_.x + (token + lane + i) * call_.num_inputs + input + k);
        transpose(block);
        Factor* to = panel.inputs + k / STEP * WIDTH + lane;
        if constexpr (IN_BF16<Weight>)
          for (int i = 0; i < LANES; i += 2) store(to + i / 2 * WIDTH, pair_of_bf16(block[i], block[i + 1]));
        else
          for (int i = 0; i < LANES; ++i) store(to + i * WIDTH, block[i]);
      }
  }

  template <int VECTORS>
  void lay_codes(int64_t token, int64_t count, int64_t input, int64_t num_inputs, const Panel& panel) {
    constexpr int WIDTH = VECTORS * LANES;
    const CodedInputs coded(call_);
    for (int lane = 0; lane < WIDTH; lane += LANES)
      for (int64_t k = 0; k < num_inputs / STEP; k += LANES) {
        Floats block[LANES] = {};  // each lane a quad, which is only moved
        for (int i = 0; i < std::min<int64_t>(LANES, count - lane); ++i)
          block[i] = load(
              reinterpret_cast<const float*>(coded.codes + (token + lane + i) * coded.num_inputs + input) + k);
        transpose(block);
        for (int i = 0; i < LANES; ++i) store(panel.inputs + (k + i) * WIDTH + lane, reinterpret_cast<Ints>(block[i]));
      }
    for (int64_t group = 0; group < num_inputs / GROUP; ++group)
      for (int lane = 0; lane < WIDTH; ++lane) {
        const int64_t from = (token + lane) * coded.num_groups + input / GROUP + group, to = group * WIDTH + lane;
        panel.scales[to] = lane < count ? coded.scales[from] : 0.0f;
        panel.starts[to] = lane < count ? coded.starts[from] : 0;
      }
  }

  template <int VECTORS, bool ADD>
  void add_rows(const Rows& weights, int64_t num_rows, int64_t num_inputs, const Panel& panel) {
    constexpr int WIDTH = VECTORS * LANES;
    const int64_t num_groups = call_.num_inputs / GROUP;
    int64_t row = 0;
    for (; row + TILE <= num_rows; row += TILE)
      add_tile<VECTORS, ADD>(weights.whole + row * weights.stride, weights.stride, weights.scales + row * num_groups,
                             num_groups, num_inputs, panel, panel.sums + row * WIDTH);
    if (row < num_rows)
      add_tile<VECTORS, ADD>(weights.rest, num_inputs / STEP, weights.rest_scales, NUM_GROUPS, num_inputs, panel,
                             panel.sums + row * WIDTH);
  }

  template <int VECTORS, bool ADD>
  void add_tile(const Factor* weights, int64_t stride, const float* scales, int64_t scale_stride, int64_t num_inputs,
                const Panel& panel, float* sums) {
    if constexpr (IN_CODES<Weight>) {
      constexpr int64_t WIDTH = VECTORS * LANES, NUM_QUADS = GROUP / STEP;
      const auto add_group = [&]<bool GOES_ON>(std::bool_constant<GOES_ON>, int64_t group) {
        multiply_group<TILE, VECTORS, GOES_ON>(
            weights + group * NUM_QUADS, stride, scales + group, scale_stride, panel.inputs + group * NUM_QUADS * WIDTH,
            panel.starts + group * WIDTH, panel.scales + group * WIDTH, sums, NUM_QUADS);
      };
      add_group(std::bool_constant<ADD>(), 0);
      for (int64_t group = 1; group < num_inputs / GROUP; ++group) add_group(std::true_type(), group);
    } else {
      multiply<TILE, VECTORS, ADD>(weights, stride, 1, panel.inputs, sums, num_inputs / STEP);
    }
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
  Buffer<Factor> inputs_;  // what panels hold, one panel behind another
  Buffer<float> scales_;
  Buffer<int32_t> starts_;
  Buffer<float> sums_;
  Buffer<Factor> copied_;  // [rows][inputs / STEP] of weights that do not lie as they are read
  Buffer<float> copied_scales_;
};

template <typename Weight>
void many_tokens(LinearCall call) {
  const int64_t num_parts = (call.num_tokens + TASK_TOKENS - 1) / TASK_TOKENS;
  int64_t rows = TASK_ROWS;  // of a task: fewer where threads would find no work
  while (rows > 2 * LANES && num_parts * ((call.num_outputs + rows - 1) / rows) < 4 * call.num_threads) rows /= 2;
  const int64_t num_blocks = (call.num_outputs + rows - 1) / rows;
  Buffer<char> coded(IN_CODES<Weight> ? prepared_bytes<Weight>(call.num_tokens, call.num_inputs) : 0);
  call.prepared = &coded[0];
#pragma omp parallel num_threads(call.num_threads)
  {
    if constexpr (IN_CODES<Weight>) {
#pragma omp for schedule(static)
      for (int64_t token = 0; token < call.num_tokens; ++token)
        CodedInputs(call).encode(call.x + token * call.num_inputs, token);
    }
    ManyTokens<Weight> worker(call);
#pragma omp for collapse(2) schedule(dynamic) nowait
    for (int64_t part = 0; part < num_parts; ++part)
      for (int64_t block = 0; block < num_blocks; ++block)
        worker.run(part * TASK_TOKENS, std::min<int64_t>(TASK_TOKENS, call.num_tokens - part * TASK_TOKENS),
                   block * rows, std::min(rows, call.num_outputs - block * rows));
  }
}

}  // namespace farspan
