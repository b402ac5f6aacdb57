// Panels over pages of bf16, by an instruction that multiplies pairs of bf16 and adds in fp32 (AVX512_BF16).
//
//   scores [keys][lanes] = K [keys][D] . Q [D / 2][lanes]              K is read where it lies, pairs to broadcast;
//   out    [D][lanes]   += V [keys / 2][D]^T . P [keys / 2][lanes]     V in pairs of keys, once per page and task.
#pragma once
#include <algorithm>

#include "cpu_rows.h"

namespace farspan {

// One vector of rows as pairs of dims, [D / 2][.] and `width` pairs apart; what is behind the last row becomes 0.
inline void to_lanes_of_pairs(const Queries& queries, int64_t first, int64_t head_dim, Pair* to, int64_t width) {
  const int count = static_cast<int>(std::clamp<int64_t>(queries.num_rows() - first, 0, LANES));
  const Pair* rows[LANES];
  for (int i = 0; i < count; ++i)
    rows[i] = reinterpret_cast<const Pair*>(static_cast<const uint16_t*>(queries.q) + queries.place(first + i, 0));
  int64_t pair = 0;
  for (; pair + LANES <= head_dim / 2; pair += LANES) {
    Floats block[LANES] = {};  // bits to move, whatever they mean
    for (int i = 0; i < count; ++i) block[i] = reinterpret_cast<Floats>(load(rows[i] + pair));
    transpose(block);
    for (int i = 0; i < LANES; ++i) store(to + (pair + i) * width, reinterpret_cast<Ints>(block[i]));
  }
  for (; pair < head_dim / 2; ++pair)
    for (int i = 0; i < LANES; ++i) to[pair * width + i] = i < count ? rows[i][pair] : 0;
}

// Values [PAGE_SIZE][D] to pairs of keys [PAGE_SIZE / 2][D]; those behind num_keys become 0, for 0 * NaN is NaN.
inline void to_pairs_of_keys(const uint16_t* values, Pair* to, int64_t num_keys, int64_t head_dim) {
  for (int64_t key = 0; key < PAGE_SIZE; key += 2) {
    const uint16_t *even = values + key * head_dim, *odd = even + head_dim;
    uint16_t* pairs = reinterpret_cast<uint16_t*>(to + key / 2 * head_dim);
    if (key + 1 < num_keys)
      for (int64_t d = 0; d < head_dim; ++d) to[key / 2 * head_dim + d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
    else
      for (int64_t d = 0; d < head_dim; ++d) pairs[2 * d] = key < num_keys ? even[d] : 0, pairs[2 * d + 1] = 0;
  }
}

// The rows of one task, as panels of PANEL lanes; the last may be narrower. Head sizes are multiples of TILE here.
class PairRows {
 public:
  PairRows(int64_t capacity, int64_t head_dim)
      : head_dim_(head_dim),
        state_(capacity),
        q_(RowState::round_up(capacity) * head_dim / 2),
        out_(RowState::round_up(capacity) * head_dim),
        values_(PAGE_SIZE / 2 * head_dim),
        weights_(PAGE_SIZE / 2 * PANEL),
        scores_(PAGE_SIZE * PANEL) {}

  void begin(const Queries& queries) {  // of bf16
    state_.begin(queries);
    std::fill_n(&out_[0], state_.padded() * head_dim_, 0.0f);
    for (int64_t first = 0; first < state_.padded(); first += PANEL) {
      const int64_t width = state_.width(first);
      Pair* panel = &q_[first * head_dim_ / 2];
      for (int64_t lane = 0; lane < width; lane += LANES)
        to_lanes_of_pairs(queries, first + lane, head_dim_, panel + lane, width);
    }
  }

  // k and v [PAGE_SIZE][D]; what lies behind num_keys may be anything.
  void attend(const uint16_t* k, const uint16_t* v, int64_t first_position, int num_keys, const Logits& logits) {
    to_pairs_of_keys(v, &values_[0], std::min<int64_t>(num_keys, state_.last_position() + 1 - first_position), head_dim_);
    for (int64_t first = 0; first < state_.padded(); first += PANEL) switch (state_.width(first) / LANES) {
        case 3: attend_panel<3>(first, k, first_position, num_keys, logits); break;
        case 2: attend_panel<2>(first, k, first_position, num_keys, logits); break;
        default: attend_panel<1>(first, k, first_position, num_keys, logits);
      }
  }

  void finish(const Results& results) const {
    for (int64_t first = 0; first < state_.padded(); first += LANES) {
      const int64_t panel = first / PANEL * PANEL;
      state_.write(first, &out_[panel * head_dim_ + first - panel], state_.width(panel), head_dim_, results);
    }
  }

 private:
  template <int VECTORS>
  void attend_panel(int64_t first, const uint16_t* k, int64_t first_position, int num_keys, const Logits& logits) {
    constexpr int64_t WIDTH = VECTORS * LANES;
    float* out = &out_[first * head_dim_];
    const Lanes lanes = state_.lanes(first, out, WIDTH);
    const Visible visible = lanes.visible<VECTORS>(first_position, num_keys, logits.window);
    if (visible.any == 0) return;
    const Pair *keys = reinterpret_cast<const Pair*>(k), *q = &q_[first * head_dim_ / 2];
    const int64_t num_pairs = head_dim_ / 2;
    for (int key = 0; key < visible.any; key += TILE)
      multiply<TILE, VECTORS, false>(keys + key * num_pairs, num_pairs, 1, q, &scores_[key * WIDTH], num_pairs);
    weigh<VECTORS>(lanes, first_position, visible, logits);
    for (int64_t d = 0; d < head_dim_; d += TILE)
      multiply<TILE, VECTORS, true>(&values_[d], 1, head_dim_, &weights_[0], out + d * WIDTH, (visible.any + 1) / 2);
  }

  // The weights of one panel, as pairs of keys.
  template <int VECTORS>
  void weigh(const Lanes& lanes, int64_t first_position, Visible visible, const Logits& logits) {
    constexpr int64_t WIDTH = VECTORS * LANES;
    const auto by = exponents<VECTORS>(&scores_[0], WIDTH, lanes, head_dim_, first_position, visible, logits);
    for (int j = 0; j < VECTORS; ++j) {
      const float* scores = &scores_[j * LANES];
      Pair* weights = &weights_[j * LANES];
      Floats sum = load(lanes.sum + j * LANES), other{};
      int key = 0;
      for (; key + 2 <= visible.any; key += 2) {
        const Floats even = exp2_for_bf16(load(scores + key * WIDTH) * by.factor - by.top[j]);
        const Floats odd = exp2_for_bf16(load(scores + (key + 1) * WIDTH) * by.factor - by.top[j]);
        store(weights + key / 2 * WIDTH, pair_of_bf16(even, odd));
        sum += even;
        other += odd;
      }
      if (key < visible.any) {
        const Floats even = exp2_for_bf16(load(scores + key * WIDTH) * by.factor - by.top[j]);
        store(weights + key / 2 * WIDTH, pair_of_bf16(even, Floats{}));
        sum += even;
      }
      store(lanes.sum + j * LANES, sum + other);
    }
  }

  int64_t head_dim_;
  RowState state_;
  Buffer<int32_t> q_;        // per panel [D / 2][width]
  Buffer<float> out_;     // per panel [D][width]
  Buffer<int32_t> values_;   // [PAGE_SIZE / 2][D]
  Buffer<int32_t> weights_;  // [PAGE_SIZE / 2][width]
  Buffer<float> scores_;  // [PAGE_SIZE][width]
};

}  // namespace farspan
