// Decode attention on CPU: one query token per sequence over the pages its rows hold, bound by reading them once.
//
// A row (sequence, KV head) is cut into pieces of PIECE tokens, always at the same places, so that threads share a
// long row and a result depends on neither batch mates nor threads. The G query heads of a row read a page together.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "native.h"

namespace {

using namespace farspan;

constexpr int64_t PIECE = 4 * PAGE_SIZE;
constexpr int KEYS = 4;   // keys in flight: they share the loads of a query, or of a sum
constexpr int HEADS = 3;  // heads in flight: 4 x 3 accumulators and 4 keys fill the registers of AVX2

}  // namespace

extern "C" struct DecodeCall {  // mirrored in cpu.py
  const float* q;               // [B][Hq][D], scaled by scale * log2(e)
  const void* k_pool;           // [num_pages][PAGE_SIZE][D]
  const void* v_pool;
  const int32_t* pages;         // [B][Hkv][row_pages]
  const int32_t* held;          // [B][Hkv]
  float* out;                   // [B][Hq][D]
  int64_t num_rows, group_size, head_dim, row_pages;  // num_rows = B * Hkv
  int32_t pool_is_bf16, num_threads;
};

namespace {

struct Piece {
  int64_t row, first, num_tokens;
};

// scores [HEAD_COUNT][PAGE_SIZE] of KEYS keys. q [HEAD_COUNT][D], k [KEYS][D]
template <int HEAD_COUNT, typename Element>
inline void score_keys(const float* q, const Element* k, int64_t head_dim, float* scores) {
  Floats sums[HEAD_COUNT][KEYS];
  for (int g = 0; g < HEAD_COUNT; ++g)
    for (int i = 0; i < KEYS; ++i) sums[g][i] = Floats{};
  for (int64_t d = 0; d < head_dim; d += LANES) {
    Floats keys[KEYS];
    for (int i = 0; i < KEYS; ++i) keys[i] = load(k + i * head_dim + d);
    for (int g = 0; g < HEAD_COUNT; ++g) {
      const Floats query = load(q + g * head_dim + d);
      for (int i = 0; i < KEYS; ++i) sums[g][i] += query * keys[i];
    }
  }
  for (int g = 0; g < HEAD_COUNT; ++g)
    for (int i = 0; i < KEYS; ++i) scores[g * PAGE_SIZE + i] = sum_of(sums[g][i]);
}

template <typename Element>
void score_page(const float* q, const Element* k, int64_t group_size, int64_t head_dim, int num_keys, float* scores) {
  for (int key = 0; key < num_keys; key += KEYS)
    for (int64_t g = 0; g < group_size; g += HEADS) {
      const float* heads = q + g * head_dim;
      float* place = scores + g * PAGE_SIZE + key;
      switch (std::min<int64_t>(HEADS, group_size - g)) {
        case 3: score_keys<3>(heads, k + key * head_dim, head_dim, place); break;
        case 2: score_keys<2>(heads, k + key * head_dim, head_dim, place); break;
        default: score_keys<1>(heads, k + key * head_dim, head_dim, place);
      }
    }
}

// out [G][D] += weights [G][PAGE_SIZE], from some key on, times COUNT rows of v [.][D].
template <int COUNT, typename Element>
inline void add_values(const float* weights, const Element* v, int64_t group_size, int64_t head_dim, float* out) {
  for (int64_t d = 0; d < head_dim; d += LANES) {
    Floats values[COUNT];
    for (int i = 0; i < COUNT; ++i) values[i] = load(v + i * head_dim + d);
    for (int64_t g = 0; g < group_size; ++g) {
      Floats sum = load(out + g * head_dim + d);
      for (int i = 0; i < COUNT; ++i) sum += weights[g * PAGE_SIZE + i] * values[i];
      store(out + g * head_dim + d, sum);
    }
  }
}

// Online softmax of one head's scores [PAGE_SIZE], log2, of which num_keys count: weights in place.
void to_weights(float* scores, int num_keys, int64_t head_dim, float& top, float& total, float* out) {
  std::fill(scores + num_keys, scores + PAGE_SIZE, -INFINITY);
  Floats most = load(scores);
  for (int key = LANES; key < PAGE_SIZE; key += LANES) most = larger(load(scores + key), most);
  const float higher = std::max(top, largest_of(most));
  if (higher > top) {
    const float shrink = std::exp2(top - higher);  // 0 at the first page, where top is -inf
    for (int64_t d = 0; d < head_dim; d += LANES) store(out + d, load(out + d) * shrink);
    total *= shrink;
    top = higher;
  }
  Floats sum{};
  for (int key = 0; key < PAGE_SIZE; key += LANES) {
    const Floats weight = exp2(load(scores + key) - top);
    store(scores + key, weight);
    sum += weight;
  }
  total += sum_of(sum);
}

// What the pieces give, per head.
struct Partials {
  explicit Partials(size_t num_pieces, int64_t group, int64_t head_dim)
      : top(num_pieces * group, -INFINITY), total(num_pieces * group, 0.0f), out(num_pieces * group * head_dim, 0.0f) {}

  std::vector<float> top;    // [piece][G] log2
  std::vector<float> total;  // [piece][G] sum of 2^(score - top)
  std::vector<float> out;    // [piece][G][D] sum of 2^(score - top) * value
};

template <typename Element>
void attend_piece(const DecodeCall& call, const Piece& piece, float* scores, float* top, float* total, float* out) {
  const int64_t group = call.group_size, head_dim = call.head_dim, page_elements = PAGE_SIZE * head_dim;
  const float* q = call.q + piece.row * group * head_dim;
  const int64_t end = piece.first + piece.num_tokens;
  for (int64_t first = piece.first; first < end; first += PAGE_SIZE) {
    const int num_keys = static_cast<int>(std::min<int64_t>(PAGE_SIZE, end - first));
    const int64_t page = call.pages[piece.row * call.row_pages + first / PAGE_SIZE];
    const Element* k = static_cast<const Element*>(call.k_pool) + page * page_elements;
    const Element* v = static_cast<const Element*>(call.v_pool) + page * page_elements;
    score_page(q, k, group, head_dim, num_keys, scores);  // and up to KEYS - 1 more, in the page but not held
    for (int64_t g = 0; g < group; ++g)
      to_weights(scores + g * PAGE_SIZE, num_keys, head_dim, top[g], total[g], out + g * head_dim);
    int key = 0;
    for (; key + KEYS <= num_keys; key += KEYS)
      add_values<KEYS>(scores + key, v + key * head_dim, group, head_dim, out);
    for (; key < num_keys; ++key) add_values<1>(scores + key, v + key * head_dim, group, head_dim, out);
  }
}

// One head of one row out of its pieces [first, end).
void merge(const DecodeCall& call, const Partials& partials, size_t first, size_t end, int64_t head, float* out) {
  const int64_t group = call.group_size, head_dim = call.head_dim;
  std::fill_n(out, head_dim, 0.0f);
  float top = -INFINITY, total = 0;
  for (size_t piece = first; piece < end; ++piece) top = std::max(top, partials.top[piece * group + head]);
  for (size_t piece = first; piece < end; ++piece)
    total += partials.total[piece * group + head] * std::exp2(partials.top[piece * group + head] - top);
  for (size_t piece = first; piece < end; ++piece) {
    const float share = std::exp2(partials.top[piece * group + head] - top) / total;
    for (int64_t d = 0; d < head_dim; ++d) out[d] += share * partials.out[(piece * group + head) * head_dim + d];
  }
}

template <typename Element>
void run(const DecodeCall& call) {
  const int64_t group = call.group_size, head_dim = call.head_dim;
  std::vector<Piece> pieces;
  std::vector<size_t> starts{0};  // of each row's pieces
  for (int64_t row = 0; row < call.num_rows; ++row) {
    for (int64_t first = 0; first < call.held[row]; first += PIECE)
      pieces.push_back({row, first, std::min(PIECE, call.held[row] - first)});
    starts.push_back(pieces.size());
  }
  Partials partials(pieces.size(), group, head_dim);
  std::atomic<size_t> next{0};
  const int num_threads = static_cast<int>(std::clamp<size_t>(pieces.size(), 1, call.num_threads));
#pragma omp parallel num_threads(num_threads)
  {
    std::vector<float> scores(group * PAGE_SIZE);
    for (size_t i = next++; i < pieces.size(); i = next++)
      attend_piece<Element>(call, pieces[i], scores.data(), &partials.top[i * group], &partials.total[i * group],
                            &partials.out[i * group * head_dim]);
#pragma omp barrier
#pragma omp for collapse(2)
    for (int64_t row = 0; row < call.num_rows; ++row)
      for (int64_t head = 0; head < group; ++head)
        merge(call, partials, starts[row], starts[row + 1], head, call.out + (row * group + head) * head_dim);
  }
}

}  // namespace

extern "C" void farspan_attend_rows(const DecodeCall* call) {
  if (call->pool_is_bf16)
    run<uint16_t>(*call);
  else
    run<float>(*call);
}

extern "C" int64_t farspan_lanes() { return LANES; }
