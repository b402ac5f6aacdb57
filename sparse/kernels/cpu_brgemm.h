// The rows of one task over pages of bf16 keys and values, by torch's brgemm (AMX or AVX512_BF16).
//
//   scores [keys][rows] = K [keys][D] . Q [D][rows]          Q in pairs of D, once per task;
//   out    [D][rows]   += V^T [D][keys] . P [keys][rows]     P in pairs of keys, as the softmax leaves them.
//
// "Pairs" is the VNNI layout of the right factor: [k / 2][rows][2].
#pragma once
#ifndef FARSPAN_BRGEMM_BY_LOOPS
#include <ATen/native/CPUBlas.h>
#endif

#include "cpu_rows.h"

namespace farspan {

// c [m][n] (+)= a [m][k] . b [k / 2][n][2], fp32 from bf16.
#ifdef FARSPAN_BRGEMM_BY_LOOPS  // what brgemm means: for tests where the processor has no bf16 instructions
inline void brgemm(int64_t m, int64_t n, int64_t k, const uint16_t* a, const uint16_t* b, float* c, bool add) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = add ? c[i * n + j] : 0.0f;
      for (int64_t l = 0; l < k; ++l)
        sum += bf16_to_float(a[i * k + l]) * bf16_to_float(b[(l / 2 * n + j) * 2 + l % 2]);
      c[i * n + j] = sum;
    }
}
inline void brgemm_release() {}
#else
inline void brgemm(int64_t m, int64_t n, int64_t k, const uint16_t* a, const uint16_t* b, float* c, bool add) {
  at::native::cpublas::brgemm(m, n, k, k, n, n, add, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c);
}
inline void brgemm_release() { at::native::cpublas::brgemm_release(); }
#endif

typedef uint16_t Eight __attribute__((vector_size(16)));
typedef uint16_t LooseEight __attribute__((vector_size(16), aligned(2), may_alias));

// to [8], `to_stride` apart = the transpose of from [8], `from_stride` apart.
inline void transpose_8x8(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride) {
  Eight x[8], y[8];
  for (int i = 0; i < 8; ++i) x[i] = *reinterpret_cast<const LooseEight*>(from + i * from_stride);
  // Three perfect shuffles of rows i and i + 4: each turns one bit of the row index into one of the column index.
  const Eight low = {0, 8, 1, 9, 2, 10, 3, 11}, high = {4, 12, 5, 13, 6, 14, 7, 15};
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + 4], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + 4], high);
    }
    for (int i = 0; i < 8; ++i) x[i] = y[i];
  }
  for (int i = 0; i < 8; ++i) *reinterpret_cast<LooseEight*>(to + i * to_stride) = x[i];
}

// Head sizes are multiples of 8 here.
class BrgemmRows {
 public:
  BrgemmRows(int64_t capacity, int64_t head_dim)
      : head_dim_(head_dim),
        state_(capacity),
        q_(RowState::round_up(capacity) * head_dim),
        values_(head_dim * PAGE_SIZE),
        weights_(PAGE_SIZE * RowState::round_up(capacity)),
        scores_(PAGE_SIZE * RowState::round_up(capacity)),
        out_(RowState::round_up(capacity) * head_dim) {}

  ~BrgemmRows() { brgemm_release(); }

  void begin(const Queries& queries) {
    state_.begin(queries);
    const int64_t padded = state_.padded();
    std::fill_n(&out_[0], padded * head_dim_, 0.0f);
    for (int64_t row = 0; row < padded; ++row)
      for (int64_t d = 0; d < head_dim_; ++d)
        q_[(d / 2 * padded + row) * 2 + d % 2] = row < queries.num_rows() ? float_to_bf16(queries.at(row, d)) : 0;
  }

  // k and v [PAGE_SIZE][D]; what lies behind num_keys may be anything.
  void attend(const uint16_t* k, const uint16_t* v, int64_t first_position, int num_keys, const Logits& logits) {
    const int64_t padded = state_.padded();
    brgemm(PAGE_SIZE, padded, head_dim_, k, &q_[0], &scores_[0], false);
    int num_values = 0;  // keys that some row of the task sees
    for (int64_t first = 0; first < padded; first += PANEL) {
      const Lanes lanes = state_.lanes(first, &out_[first], padded);
      switch (state_.width(first) / LANES) {
        case 3: num_values = std::max(num_values, weigh<3>(first, lanes, first_position, num_keys, logits)); break;
        case 2: num_values = std::max(num_values, weigh<2>(first, lanes, first_position, num_keys, logits)); break;
        default: num_values = std::max(num_values, weigh<1>(first, lanes, first_position, num_keys, logits));
      }
    }
    for (int64_t key = 0; key < PAGE_SIZE; key += 8)
      for (int64_t d = 0; d < head_dim_; d += 8)
        transpose_8x8(v + key * head_dim_ + d, head_dim_, &values_[d * PAGE_SIZE + key], PAGE_SIZE);
    // The weights of the rest are 0, but 0 * NaN is NaN.
    for (int64_t d = 0; d < head_dim_; ++d)
      for (int64_t key = num_values; key < PAGE_SIZE; ++key) values_[d * PAGE_SIZE + key] = 0;
    brgemm(head_dim_, padded, PAGE_SIZE, &values_[0], &weights_[0], &out_[0], true);
  }

  void finish(const Results& results) const {
    for (int64_t first = 0; first < state_.padded(); first += LANES)
      state_.write(first, &out_[first], state_.padded(), head_dim_, results);
  }

 private:
  // The weights of one panel, as pairs of keys; those that it does not see are 0. Gives the keys that it sees.
  template <int VECTORS>
  int weigh(int64_t first, const Lanes& lanes, int64_t first_position, int num_keys, const Logits& logits) {
    const int64_t padded = state_.padded();
    const Visible visible = lanes.visible<VECTORS>(first_position, num_keys, logits.window);
    if (visible.any > 0)
      to_weights<VECTORS>(&scores_[first], padded, lanes, head_dim_, first_position, visible, logits);
    for (int key = 0; key < PAGE_SIZE; key += 2)
      for (int j = 0; j < VECTORS; ++j) {
        const int64_t lane = first + j * LANES;
        const Floats even = key < visible.any ? load(&scores_[key * padded + lane]) : Floats{};
        const Floats odd = key + 1 < visible.any ? load(&scores_[(key + 1) * padded + lane]) : Floats{};
        store(reinterpret_cast<int32_t*>(&weights_[(key / 2 * padded + lane) * 2]), pair_of_bf16(even, odd));
      }
    return visible.any;
  }

  int64_t head_dim_;
  RowState state_;
  Buffer<uint16_t> q_;        // [D / 2][rows][2]
  Buffer<uint16_t> values_;   // [D][PAGE_SIZE]
  Buffer<uint16_t> weights_;  // [PAGE_SIZE / 2][rows][2]
  Buffer<float> scores_;      // [PAGE_SIZE][rows]
  Buffer<float> out_;         // [D][rows]
};

}  // namespace farspan
