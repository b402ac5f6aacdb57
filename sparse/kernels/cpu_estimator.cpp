// The last-window estimator's sums on CPU: weights of a few rows, whose lse is known, by key and by distance.
//
// A key's scores stand side by side in lanes, one row each, so that they lie on neighbouring diagonals: a vector of
// weights is added to the sums of as many distances at once. Tasks are (query head, PART keys); the distances of one
// overlap with those of the next, so each sums its own, and the parts of a head are added up in order.
#include <vector>

#include "cpu_panels.h"

namespace {

using namespace farspan;

constexpr int64_t PART = 32 * PAGE_SIZE;  // keys

}  // namespace

extern "C" struct SumCall {  // mirrored in cpu_estimator.py
  const void* q;             // [Hq][num_rows][D]
  const void* k_pool;        // [num_pages][PAGE_SIZE][D]
  const float* k_scales;     // [num_pages][PAGE_SIZE] of codes, else null
  const int32_t* pages;      // [Hkv][num_blocks], -1 = dropped
  const float* lse;          // [Hq][num_rows] natural log
  float* columns;            // [Hq][N]; N = first + num_rows
  float* diagonals;          // [Hq][N]
  int64_t q_head_stride, q_row_stride;
  int64_t first, num_rows;   // the rows at positions [first, first + num_rows)
  int64_t num_heads, num_kv_heads, head_dim, num_blocks;
  float scale;
  int32_t q_is_bf16, pool_type, num_threads;
};

namespace {

// The rows of one head, in panels.
class WindowRows {
 public:
  WindowRows(int64_t num_rows, int64_t head_dim)
      : head_dim_(head_dim),
        padded_(RowState::round_up(num_rows)),
        q_(padded_ * head_dim),
        lse_(padded_),
        scores_(PAGE_SIZE * PANEL) {}

  void begin(const Queries& queries, const float* lse, float scale) {
    first_ = queries.first_position;
    factor_ = scale * LOG2_E;
    for (int64_t first = 0; first < padded_; first += PANEL) {
      const int64_t width = std::min<int64_t>(PANEL, padded_ - first);
      for (int64_t lane = 0; lane < width; lane += LANES)
        to_lanes(queries, first + lane, head_dim_, &q_[first * head_dim_ + lane], width);
    }
    for (int64_t row = 0; row < padded_; ++row) {
      const bool reads = row < queries.num_rows() && lse[row] != -INFINITY;
      lse_[row] = reads ? lse[row] * LOG2_E : INFINITY;  // weights of the others are 0
    }
  }

  // Keys k [PAGE_SIZE][D] at positions [position, position + num_keys); what lies behind them may be anything. Adds to
  // columns [num_keys], and to the sums of distances, of which diagonals is that of the first row to the last key.
  void sum(const float* k, int64_t position, int num_keys, float* columns, float* diagonals) {
    for (int64_t first = 0; first < padded_; first += PANEL) switch (std::min<int64_t>(PANEL, padded_ - first) / LANES) {
        case 3: sum_panel<3>(first, k, position, num_keys, columns, diagonals + first); break;
        case 2: sum_panel<2>(first, k, position, num_keys, columns, diagonals + first); break;
        default: sum_panel<1>(first, k, position, num_keys, columns, diagonals + first);
      }
  }

 private:
  template <int VECTORS>
  void sum_panel(int64_t first, const float* k, int64_t position, int num_keys, float* columns, float* diagonals) {
    constexpr int WIDTH = VECTORS * LANES;
    for (int key = 0; key < num_keys; key += TILE)
      multiply<TILE, VECTORS, false>(k + key * head_dim_, head_dim_, 1, &q_[first * head_dim_], &scores_[key * WIDTH],
                                     head_dim_);
    Ints row;  // of the first vector
    for (int lane = 0; lane < LANES; ++lane) row[lane] = static_cast<int32_t>(first + lane);
    for (int key = 0; key < num_keys; ++key) {
      const int32_t seen_from = static_cast<int32_t>(position + key - first_);  // the first row that sees it
      float* sums = diagonals + (num_keys - 1 - key);
      Floats all{};
      for (int j = 0; j < VECTORS; ++j) {
        const Floats score = load(&scores_[key * WIDTH + j * LANES]) * factor_ - load(&lse_[first + j * LANES]);
        const Floats weight = row + j * LANES >= seen_from ? exp2(score) : Floats{};
        store(sums + j * LANES, load(sums + j * LANES) + weight);
        all += weight;
      }
      columns[key] += sum_of(all);
    }
  }

  int64_t head_dim_, padded_, first_ = 0;
  float factor_ = 0;
  Buffer<float> q_;       // per panel [D][width]
  Buffer<float> lse_;     // [rows] log2
  Buffer<float> scores_;  // [PAGE_SIZE][width]
};

// Sums of distances of one part of the keys of a head: [PART + rows], from that of the first row to its last key on.
struct PartSums {
  int64_t first_key, end_key, stride;
  float* sums;

  PartSums(const SumCall& call, Buffer<float>& parts, int64_t num_parts, int64_t head, int64_t part)
      : first_key(part * PART),
        end_key(std::min(first_key + PART, call.first + call.num_rows)),
        stride(PART + RowState::round_up(call.num_rows)),
        sums(&parts[(head * num_parts + part) * stride]) {}
};

template <typename Element>
void sum_part(const SumCall& call, int64_t head, const PartSums& part, WindowRows& rows, Buffer<float>& wide) {
  const int64_t kv_head = head * call.num_kv_heads / call.num_heads, num_tokens = call.first + call.num_rows;
  const int64_t at = head * call.q_head_stride;
  const void* q = call.q_is_bf16 ? static_cast<const void*>(static_cast<const uint16_t*>(call.q) + at)
                                 : static_cast<const float*>(call.q) + at;
  rows.begin({q, call.q_is_bf16 != 0, call.q_head_stride, call.q_row_stride, 1, call.num_rows, call.first},
             call.lse + head * call.num_rows, call.scale);
  float* columns = call.columns + head * num_tokens;
  std::fill(columns + part.first_key, columns + part.end_key, 0.0f);
  std::fill_n(part.sums, part.stride, 0.0f);
  for (int64_t key = part.first_key; key < part.end_key; key += PAGE_SIZE) {
    const int64_t page = call.pages[kv_head * call.num_blocks + key / PAGE_SIZE];
    if (page < 0) continue;
    const int num_keys = static_cast<int>(std::min<int64_t>(PAGE_SIZE, part.end_key - key));
    const Element* k = static_cast<const Element*>(call.k_pool) + page * PAGE_SIZE * call.head_dim;
    const float* read;
    if constexpr (std::is_same_v<Element, float>) {
      read = k;
    } else {
      if constexpr (IS_CODE<Element>)
        widen(k, call.k_scales + page * PAGE_SIZE, &wide[0], num_keys, call.head_dim);
      else
        widen(k, &wide[0], num_keys * call.head_dim);
      read = &wide[0];
    }
    rows.sum(read, key, num_keys, columns + key, part.sums + (part.end_key - key - num_keys));
  }
}

template <typename Element>
void run(const SumCall& call) {
  const int64_t num_tokens = call.first + call.num_rows, num_parts = (num_tokens + PART - 1) / PART;
  Buffer<float> parts(call.num_heads * num_parts * (PART + RowState::round_up(call.num_rows)));
#pragma omp parallel num_threads(call.num_threads)
  {
    WindowRows rows(call.num_rows, call.head_dim);
    Buffer<float> wide(PAGE_SIZE * call.head_dim);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t head = 0; head < call.num_heads; ++head)
      for (int64_t part = 0; part < num_parts; ++part)
        sum_part<Element>(call, head, {call, parts, num_parts, head, part}, rows, wide);
#pragma omp for schedule(static)
    for (int64_t head = 0; head < call.num_heads; ++head) {
      float* diagonals = call.diagonals + head * num_tokens;
      std::fill_n(diagonals, num_tokens, 0.0f);
      for (int64_t part = 0; part < num_parts; ++part) {
        const PartSums from(call, parts, num_parts, head, part);
        const int64_t nearest = call.first - (from.end_key - 1);  // negative: rows before the key
        const int64_t end = std::min(num_tokens, call.first + call.num_rows - from.first_key);
        for (int64_t distance = std::max<int64_t>(0, nearest); distance < end; ++distance)
          diagonals[distance] += from.sums[distance - nearest];
      }
    }
  }
}

}  // namespace

extern "C" void farspan_sum_lines(const SumCall* call) {
  switch (call->pool_type) {
    case POOL_FP32: return run<float>(*call);
    case POOL_BF16: return run<uint16_t>(*call);
    case POOL_INT8: return run<int8_t>(*call);
    default: return run<Fp8>(*call);
  }
}
