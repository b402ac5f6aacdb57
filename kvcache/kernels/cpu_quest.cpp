// Quest's choice on CPU: the units of each row with the best bounds, which are read once and where they are.
#include <algorithm>
#include <numeric>
#include <vector>

#include "native.h"

namespace {

using namespace farspan;

constexpr int UNIT = 16;  // tokens
constexpr int PER_PAGE = PAGE_SIZE / UNIT;

}  // namespace

extern "C" struct ChooseCall {  // mirrored in cpu_quest.py
  const float* q;               // [B][Hq][D]
  const float* bounds;          // [num_pages][PER_PAGE][2][D], the least and the largest
  const int32_t* pages;         // [B][Hkv][row_pages]
  const int32_t* held;          // [B][Hkv] tokens
  int32_t* ids;                 // [B][Hkv][chosen]
  int64_t num_rows, group_size, head_dim, row_pages;  // num_rows = B * Hkv
  int64_t first, nearest, chosen;                     // units: at the beginning and the end not to choose from
  int32_t num_threads;
};

namespace {

// The sum over the heads of a row of q where it is negative, and then of q where it is positive: weights [2][D].
void sum_heads(const ChooseCall& call, int64_t row, float* weights) {
  const float* q = call.q + row * call.group_size * call.head_dim;
  std::fill_n(weights, 2 * call.head_dim, 0.0f);
  for (int64_t g = 0; g < call.group_size; ++g)
    for (int64_t d = 0; d < call.head_dim; ++d) {
      weights[d] += std::min(q[g * call.head_dim + d], 0.0f);
      weights[call.head_dim + d] += std::max(q[g * call.head_dim + d], 0.0f);
    }
}

// x [count] times y [count], count a multiple of LANES.
float product(const float* x, const float* y, int64_t count) {
  Floats sum{};
  for (int64_t i = 0; i < count; i += LANES) sum += load(x + i) * load(y + i);
  return sum_of(sum);
}

void choose(const ChooseCall& call, int64_t row, std::vector<float>& scores, std::vector<int32_t>& units,
            std::vector<float>& weights) {
  const int64_t end = (call.held[row] + UNIT - 1) / UNIT - call.nearest, size = 2 * call.head_dim;
  int32_t* ids = call.ids + row * call.chosen;
  if (end - call.first <= call.chosen) {  // a row that is read whole: any ids will do
    std::iota(ids, ids + call.chosen, static_cast<int32_t>(call.first));
    return;
  }
  sum_heads(call, row, weights.data());
  scores.resize(end);
  units.resize(end - call.first);
  std::iota(units.begin(), units.end(), static_cast<int32_t>(call.first));
  for (const int64_t unit : units) {
    const int64_t page = call.pages[row * call.row_pages + unit / PER_PAGE];
    scores[unit] = product(weights.data(), call.bounds + (page * PER_PAGE + unit % PER_PAGE) * size, size);
  }
  const auto better = [&](int32_t a, int32_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; };
  std::nth_element(units.begin(), units.begin() + call.chosen, units.end(), better);
  std::copy_n(units.begin(), call.chosen, ids);
  std::sort(ids, ids + call.chosen);
}

}  // namespace

extern "C" void farspan_choose_units(const ChooseCall* call) {
  const int num_threads = static_cast<int>(std::clamp<int64_t>(call->num_rows, 1, call->num_threads));
#pragma omp parallel num_threads(num_threads)
  {
    std::vector<float> scores, weights(2 * call->head_dim);
    std::vector<int32_t> units;
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < call->num_rows; ++row) choose(*call, row, scores, units, weights);
  }
}

extern "C" int64_t farspan_lanes() { return LANES; }
