// Panels: query rows side by side in vector lanes, and their online softmax over pages of fp32 keys and values.
//
//   scores [keys][lanes] = K [keys][D] . Q [D][lanes]        K and V are read where they lie, as scalars to broadcast;
//   out    [D][lanes]   += V [keys][D]^T . P [keys][lanes]   only Q is transposed, once per task.
#pragma once
#include <algorithm>

#include "cpu_rows.h"

namespace farspan {

// One vector of rows, [D][.] and `width` floats apart; what is behind the last row becomes 0.
inline void to_lanes(const Queries& queries, int64_t first, int64_t head_dim, float* to, int64_t width) {
  const int count = static_cast<int>(std::clamp<int64_t>(queries.num_rows() - first, 0, LANES));
  int64_t d = 0;
  for (; d + LANES <= head_dim; d += LANES) {
    Floats block[LANES] = {};
    for (int i = 0; i < count; ++i) block[i] = queries.vector_at(first + i, d);
    transpose(block);
    for (int i = 0; i < LANES; ++i) store(to + (d + i) * width, block[i]);
  }
  for (; d < head_dim; ++d)
    for (int i = 0; i < LANES; ++i) to[d * width + i] = i < count ? queries.at(first + i, d) : 0.0f;
}

// One panel over the keys at positions [first, first + num_keys). q [D][lanes], k and v [PAGE_SIZE][D]; what lies
// behind num_keys may be anything: its scores are not looked at, its values not read.
template <int VECTORS>
void attend_panel(const float* q, const Lanes& lanes, const float* k, const float* v, int64_t head_dim, int64_t first,
                  int num_keys, const Logits& logits) {
  constexpr int WIDTH = VECTORS * LANES;
  const Visible visible = lanes.visible<VECTORS>(first, num_keys, logits.window);
  if (visible.any == 0) return;
  alignas(64) float scores[PAGE_SIZE * WIDTH];
  for (int key = 0; key < visible.any; key += TILE)
    multiply<TILE, VECTORS, false>(k + key * head_dim, head_dim, 1, q, scores + key * WIDTH, head_dim);
  to_weights<VECTORS>(scores, WIDTH, lanes, head_dim, first, visible, logits);
  int64_t d = 0;
  for (; d + TILE <= head_dim; d += TILE)
    multiply<TILE, VECTORS, true>(v + d, 1, head_dim, scores, lanes.out + d * WIDTH, visible.any);
  for (; d < head_dim; ++d)
    multiply<1, VECTORS, true>(v + d, 1, head_dim, scores, lanes.out + d * WIDTH, visible.any);
}

// The rows of one task, as panels of PANEL lanes; the last may be narrower.
class PanelRows {
 public:
  PanelRows(int64_t capacity, int64_t head_dim)
      : head_dim_(head_dim),
        state_(capacity),
        q_(RowState::round_up(capacity) * head_dim),
        out_(RowState::round_up(capacity) * head_dim),
        widened_(2 * PAGE_SIZE * head_dim) {}

  void begin(const Queries& queries) {
    state_.begin(queries);
    std::fill_n(&out_[0], state_.padded() * head_dim_, 0.0f);
    for (int64_t first = 0; first < state_.padded(); first += PANEL) {
      const int64_t width = state_.width(first);
      float* panel = &q_[first * head_dim_];
      for (int64_t lane = 0; lane < width; lane += LANES) to_lanes(queries, first + lane, head_dim_, panel + lane, width);
    }
  }

  void attend(const float* k, const float* v, int64_t first_position, int num_keys, const Logits& logits) {
    for (int64_t first = 0; first < state_.padded(); first += PANEL) {
      const int64_t width = state_.width(first);
      const float* q = &q_[first * head_dim_];
      const Lanes lanes = state_.lanes(first, &out_[first * head_dim_], width);
      switch (width / LANES) {
        case 3: attend_panel<3>(q, lanes, k, v, head_dim_, first_position, num_keys, logits); break;
        case 2: attend_panel<2>(q, lanes, k, v, head_dim_, first_position, num_keys, logits); break;
        default: attend_panel<1>(q, lanes, k, v, head_dim_, first_position, num_keys, logits);
      }
    }
  }

  void attend(const uint16_t* k, const uint16_t* v, int64_t first_position, int num_keys, const Logits& logits) {
    float* wide_k = &widened_[0];
    float* wide_v = &widened_[PAGE_SIZE * head_dim_];
    widen(k, wide_k, num_keys * head_dim_);
    widen(v, wide_v, num_keys * head_dim_);
    attend(wide_k, wide_v, first_position, num_keys, logits);
  }

  void finish(const Results& results) const {
    for (int64_t first = 0; first < state_.padded(); first += LANES) {
      const int64_t panel = first / PANEL * PANEL;
      state_.write(first, &out_[panel * head_dim_ + first - panel], state_.width(panel), head_dim_, results);
    }
  }

 private:
  int64_t head_dim_;
  RowState state_;
  Buffer<float> q_, out_;  // per panel [D][width]
  Buffer<float> widened_;  // [2][PAGE_SIZE][D]: a bf16 page of keys, and one of values
};

}  // namespace farspan
