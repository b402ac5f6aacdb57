// Rows: the query rows of one task, one per vector lane, and the online softmax that runs over their scores.
//
// Every row lives in one lane, so maximum, sum and rescaling need no reduction across lanes, and what one row does
// never touches another: a row's result is bit for bit the same whatever stands beside it.
#pragma once
#include <algorithm>
#include <cmath>

#include "tiles.h"

namespace farspan {

// A row's maximum is raised only when a score passes it by this much (log2): rescaling is rare, weights stay below 2^8.
constexpr float SLACK = 8.0f;
constexpr int32_t NO_WINDOW = INT32_MAX;
constexpr float NO_KEY = -1e30f;  // the maximum of a row that has read nothing; finite, as -inf - -inf is NaN
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// The queries of one task: row = token * num_heads + head, so positions ascend with the row.
struct Queries {
  const void* q;  // [heads][tokens][D]
  bool is_bf16;
  int64_t head_stride, token_stride, num_heads, num_tokens;
  int64_t first_position;

  int64_t num_rows() const { return num_heads * num_tokens; }

  int64_t place(int64_t row, int64_t d) const {
    return row % num_heads * head_stride + row / num_heads * token_stride + d;
  }
  float at(int64_t row, int64_t d) const {
    const int64_t i = place(row, d);
    return is_bf16 ? bf16_to_float(static_cast<const uint16_t*>(q)[i]) : static_cast<const float*>(q)[i];
  }
  Floats vector_at(int64_t row, int64_t d) const {
    const int64_t i = place(row, d);
    return is_bf16 ? load(static_cast<const uint16_t*>(q) + i) : load(static_cast<const float*>(q) + i);
  }
};

// How q.k becomes a logit in log2 units, and which keys a row sees.
struct Logits {
  float factor;    // > 0, of q.k; with a softcap, makes it the exponent of 2 in tanh(x) = 1 - 2 / (1 + 2^exponent)
  float softcap;   // log2 units, 0 = none
  int32_t window;  // keys that a row sees at most, its own the last
};

// Where the rows of a task go.
struct Results {
  void* out;           // [heads][head_tokens][D], from the task's first head and token on
  float* lse;          // [heads][head_tokens]
  const float* sinks;  // [heads] natural log, or null
  bool is_bf16;
  int64_t head_tokens;

  void put(int64_t place, float x) const {
    if (is_bf16)
      static_cast<uint16_t*>(out)[place] = float_to_bf16(x);
    else
      static_cast<float*>(out)[place] = x;
  }
  void put(int64_t place, Floats x) const {
    if (is_bf16)
      store(static_cast<uint16_t*>(out) + place, x);
    else
      store(static_cast<float*>(out) + place, x);
  }
};

struct Visible {
  int any;  // keys of the page that some row sees, from its first on
  int all;  // of these, keys that every row sees
};

// One panel of rows: VECTORS vectors from each of these places on.
struct Lanes {
  const int32_t* position;
  float* top;  // maximum used so far, log2
  float* sum;  // of 2^(score - top)
  float* out;  // [D], `stride` floats apart, not yet divided by sum
  int64_t stride;

  // Of the keys at positions [first, first + num_keys). Where the window of some row begins among them, no key counts
  // as seen by every row.
  template <int VECTORS>
  Visible visible(int64_t first, int num_keys, int32_t window) const {
    const int64_t top = position[VECTORS * LANES - 1];
    int64_t any = std::clamp<int64_t>(top - first + 1, 0, num_keys);
    int64_t all = std::clamp<int64_t>(position[0] - first + 1, 0, any);
    if (window != NO_WINDOW) {
      if (first + any <= position[0] - window + 1) any = 0;
      if (first <= top - window) all = 0;
    }
    return {static_cast<int>(any), static_cast<int>(all)};
  }
};

// Caps the scores [key], `stride` floats apart, of num_keys keys: logits in log2 units, in place.
template <int VECTORS>
inline void cap(float* scores, int64_t stride, int num_keys, const Logits& logits) {
  for (int key = 0; key < num_keys; ++key)
    for (int j = 0; j < VECTORS; ++j) {
      float* place = scores + key * stride + j * LANES;
      store(place, logits.softcap * tanh_of_half(load(place) * logits.factor));
    }
}

// What turns scores into weights: 2^(score * factor - top).
template <int VECTORS>
struct Exponents {
  float factor;
  Floats top[VECTORS];
};

// Masks and caps the scores [key], `stride` floats apart, of the visible keys, in place; raises the rows' maxima.
template <int VECTORS>
inline Exponents<VECTORS> exponents(float* scores, int64_t stride, const Lanes& lanes, int64_t head_dim, int64_t first,
                                    Visible visible, const Logits& logits) {
  const float factor = logits.softcap > 0 ? 1.0f : logits.factor;
  if (logits.softcap > 0) cap<VECTORS>(scores, stride, visible.any, logits);
  Floats top[VECTORS];
  for (int j = 0; j < VECTORS; ++j) top[j] = splat(-INFINITY);
  for (int key = 0; key < visible.all; ++key)
    for (int j = 0; j < VECTORS; ++j) top[j] = larger(load(scores + key * stride + j * LANES), top[j]);
  for (int key = visible.all; key < visible.any; ++key)
    for (int j = 0; j < VECTORS; ++j) {
      float* place = scores + key * stride + j * LANES;
      const Ints position = load(lanes.position + j * LANES);
      const int32_t of_key = static_cast<int32_t>(first + key);
      const Ints seen = (position >= of_key) & (position - logits.window < of_key);
      const Floats score = seen ? load(place) : splat(-INFINITY);
      store(place, score);
      top[j] = larger(score, top[j]);
    }
  bool rises = false;
  for (int j = 0; j < VECTORS; ++j) {
    const Floats before = load(lanes.top + j * LANES);
    const Ints higher = top[j] * factor > before + SLACK;
    rises |= any(higher);
    top[j] = higher ? top[j] * factor : before;  // lane by lane: a row's rounding must not depend on its neighbours
  }
  if (rises) {
    Floats shrink[VECTORS];
    for (int j = 0; j < VECTORS; ++j) {
      shrink[j] = exp2(load(lanes.top + j * LANES) - top[j]);
      store(lanes.top + j * LANES, top[j]);
      store(lanes.sum + j * LANES, load(lanes.sum + j * LANES) * shrink[j]);
    }
    for (int64_t d = 0; d < head_dim; ++d)
      for (int j = 0; j < VECTORS; ++j) {
        float* place = lanes.out + d * lanes.stride + j * LANES;
        store(place, load(place) * shrink[j]);
      }
  }
  Exponents<VECTORS> result{factor, {}};
  for (int j = 0; j < VECTORS; ++j) result.top[j] = top[j];
  return result;
}

// Turns the scores [key], `stride` floats apart, of the visible keys into weights, in place.
template <int VECTORS>
inline void to_weights(float* scores, int64_t stride, const Lanes& lanes, int64_t head_dim, int64_t first,
                       Visible visible, const Logits& logits) {
  const Exponents<VECTORS> by = exponents<VECTORS>(scores, stride, lanes, head_dim, first, visible, logits);
  Floats sum[VECTORS];
  for (int j = 0; j < VECTORS; ++j) sum[j] = load(lanes.sum + j * LANES);
  for (int key = 0; key < visible.any; ++key)
    for (int j = 0; j < VECTORS; ++j) {
      float* place = scores + key * stride + j * LANES;
      const Floats weight = exp2(load(place) * by.factor - by.top[j]);
      store(place, weight);
      sum[j] += weight;
    }
  for (int j = 0; j < VECTORS; ++j) store(lanes.sum + j * LANES, sum[j]);
}

// Positions, maxima and sums of the rows of one task.
class RowState {
 public:
  explicit RowState(int64_t capacity)
      : position_(round_up(capacity)), top_(round_up(capacity)), sum_(round_up(capacity)) {}

  static int64_t round_up(int64_t rows) { return (rows + LANES - 1) / LANES * LANES; }

  int64_t padded() const { return padded_; }  // rows of `queries`, up to whole vectors
  int64_t last_position() const { return position_[padded_ - 1]; }
  int64_t width(int64_t first) const { return std::min<int64_t>(PANEL, padded_ - first); }  // of the panel there

  void begin(const Queries& queries) {
    queries_ = queries;
    padded_ = round_up(queries.num_rows());
    for (int64_t row = 0; row < padded_; ++row) {
      const int64_t like = std::min(row, queries.num_rows() - 1);  // padding does as the last row does
      position_[row] = static_cast<int32_t>(queries.first_position + like / queries.num_heads);
      top_[row] = NO_KEY;
      sum_[row] = 0;
    }
  }

  Lanes lanes(int64_t first, float* out, int64_t stride) {
    return {&position_[first], &top_[first], &sum_[first], out, stride};
  }

  // The rows of the vector that starts at row `first`, from sums [D], `stride` floats apart.
  void write(int64_t first, const float* sums, int64_t stride, int64_t head_dim, const Results& results) const {
    const int count = static_cast<int>(std::min<int64_t>(LANES, queries_.num_rows() - first));
    int64_t places[LANES];
    float shares[LANES];
    for (int i = 0; i < count; ++i) {
      const int64_t row = first + i;
      const bool empty = sum_[row] == 0;
      places[i] = row % queries_.num_heads * results.head_tokens + row / queries_.num_heads;
      shares[i] = empty ? 0.0f : 1.0f / sum_[row];
      float lse = empty ? -INFINITY : (top_[row] + std::log2(sum_[row])) * LN_2;
      if (results.sinks) {
        const float sink = results.sinks[row % queries_.num_heads];
        const float whole = std::max(lse, sink) + std::log1p(std::exp(-std::abs(lse - sink)));
        shares[i] *= std::exp(lse - whole);
        lse = whole;
      }
      results.lse[places[i]] = lse;
    }
    int64_t d = 0;
    for (; d + LANES <= head_dim; d += LANES) {
      Floats block[LANES];
      for (int i = 0; i < LANES; ++i) block[i] = load(sums + (d + i) * stride);
      transpose(block);
      for (int i = 0; i < count; ++i) results.put(places[i] * head_dim + d, block[i] * shares[i]);
    }
    for (; d < head_dim; ++d)
      for (int i = 0; i < count; ++i) results.put(places[i] * head_dim + d, sums[d * stride + i] * shares[i]);
  }

 private:
  Queries queries_{};
  int64_t padded_ = 0;
  Buffer<int32_t> position_;
  Buffer<float> top_, sum_;
};

}  // namespace farspan
