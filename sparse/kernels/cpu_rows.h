// Rows: the query rows of one task, one per vector lane: their positions, and the running maximum and sum of a softmax.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "native.h"

namespace farspan {

constexpr int PANEL_VECTORS = 3;
constexpr int PANEL = PANEL_VECTORS * LANES;

// A row's maximum is raised only when a score passes it by this much (log2): rescaling is rare, weights stay below 2^8.
constexpr float SLACK = 8.0f;
constexpr float NO_KEY = -1e30f;  // the maximum of a row that has read nothing; finite, as -inf - -inf is NaN
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// Memory that a thread reuses from task to task, aligned for vectors.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : memory_(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64 + 64)), std::free) {}
  T& operator[](int64_t i) { return memory_.get()[i]; }
  const T& operator[](int64_t i) const { return memory_.get()[i]; }
  void clear(int64_t size) { std::memset(memory_.get(), 0, size * sizeof(T)); }

 private:
  std::unique_ptr<T, decltype(&std::free)> memory_;
};

// The queries of one task: row = token * num_heads + head, so positions ascend with the row.
struct Queries {
  const void* q;  // [heads][tokens][D]
  bool is_bf16;
  int64_t head_stride, token_stride, num_heads, num_tokens;
  int64_t first_position;

  int64_t num_rows() const { return num_heads * num_tokens; }
  float at(int64_t row, int64_t d) const {
    const int64_t offset = row % num_heads * head_stride + row / num_heads * token_stride + d;
    return is_bf16 ? bf16_to_float(static_cast<const uint16_t*>(q)[offset]) : static_cast<const float*>(q)[offset];
  }
};

// Where the task's rows go.
struct Results {
  void* out;  // [heads][tokens][D]
  float* lse;  // [heads][tokens]
  bool is_bf16;
  int64_t head_tokens;  // tokens per head in out and lse
};
