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
constexpr float LOG2_E = 1.4426950408889634f;
constexpr int KEYS = 4;   // keys scored together, and
constexpr int HEADS = 3;  // query heads: 4 x 3 sums and 4 vectors of keys fill the registers of AVX2

}  // namespace

extern "C" struct DecodeCall {  // mirrored in cpu.py
  const float* q;               // [B][Hq][D], scaled by scale * log2(e)
  const void* k_pool;           // [num_pages][PAGE_SIZE][D]
  const void* v_pool;
  const int32_t* pages;         // [B][Hkv][row_pages]
  const int32_t* held;          // [B][Hkv]
  const float* sinks;           // [Hq] natural log, or null
  float* out;                   // [B][Hq][D]
  int64_t num_rows, num_kv_heads, group_size, head_dim, row_pages;  // num_rows = B * Hkv
  int64_t window;               // the last tokens of a row that are read, 0 = all
  float softcap;                // 0 = none
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

// out [HEAD_COUNT][D] += weights [HEAD_COUNT][PAGE_SIZE] times v [num_keys][D], VECTORS vectors of D.
template <int HEAD_COUNT, int VECTORS, typename Element>
inline void add_columns(const float* weights, const Element* v, int num_keys, int64_t head_dim, float* out) {
  Floats sums[HEAD_COUNT][VECTORS];
  for (int g = 0; g < HEAD_COUNT; ++g)
    for (int j = 0; j < VECTORS; ++j) sums[g][j] = load(out + g * head_dim + j * LANES);
  for (int key = 0; key < num_keys; ++key) {
    Floats values[VECTORS];
    for (int j = 0; j < VECTORS; ++j) values[j] = held(load(v + key * head_dim + j * LANES));
    for (int g = 0; g < HEAD_COUNT; ++g) {
      const Floats weight = splat(weights[g * PAGE_SIZE + key]);
      for (int j = 0; j < VECTORS; ++j) sums[g][j] += weight * values[j];
    }
  }
  for (int g = 0; g < HEAD_COUNT; ++g)
    for (int j = 0; j < VECTORS; ++j) store(out + g * head_dim + j * LANES, sums[g][j]);
}

template <int HEAD_COUNT, typename Element>
void add_values(const float* weights, const Element* v, int num_keys, int64_t head_dim, float* out) {
  constexpr int64_t COLUMNS = 4 * LANES;
  int64_t d = 0;
  for (; d + COLUMNS <= head_dim; d += COLUMNS) add_columns<HEAD_COUNT, 4>(weights, v + d, num_keys, head_dim, out + d);
  for (; d < head_dim; d += LANES) add_columns<HEAD_COUNT, 1>(weights, v + d, num_keys, head_dim, out + d);
}

// Caps one head's scores [PAGE_SIZE], log2.
void cap(float* scores, float softcap) {
  for (int key = 0; key < PAGE_SIZE; key += LANES)
    store(scores + key, softcap * LOG2_E * tanh_of_half(load(scores + key) * (2 / softcap)));
}

// Which keys of a page count: [first, end).
struct Keys {
  int first, end;
};

// Online softmax of one head's scores [PAGE_SIZE], log2: weights in place.
void to_weights(float* scores, Keys keys, int64_t head_dim, float& top, float& total, float* out) {
  std::fill(scores, scores + keys.first, -INFINITY);
  std::fill(scores + keys.end, scores + PAGE_SIZE, -INFINITY);
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

// Some heads of one row, in one piece of it.
struct Heads {
  const float* q;  // [heads][D]
  float *top, *total, *out;
};

// Bring memory closer that is read soon: a page is too short for the processor to guess it by itself.
template <typename Element>
inline void fetch(const Element* from, int64_t count) {
  constexpr int64_t LINE = 64 / sizeof(Element);
  for (int64_t i = 0; i < count; i += LINE) __builtin_prefetch(from + i);
}

template <int HEAD_COUNT, typename Element>
void attend_page(const Heads& heads, const Element* k, const Element* v, Keys keys, int64_t head_dim, float softcap) {
  alignas(64) float scores[HEAD_COUNT * PAGE_SIZE];
  const int whole = keys.first / KEYS * KEYS;
  for (int key = whole; key < keys.end; key += KEYS) {  // and a few at either end that do not count
    fetch(v + key * head_dim, KEYS * head_dim);
    score_keys<HEAD_COUNT>(heads.q, k + key * head_dim, head_dim, scores + key);
  }
  for (int g = 0; g < HEAD_COUNT; ++g) {
    if (softcap > 0) cap(scores + g * PAGE_SIZE, softcap);
    to_weights(scores + g * PAGE_SIZE, keys, head_dim, heads.top[g], heads.total[g], heads.out + g * head_dim);
  }
  add_values<HEAD_COUNT>(scores + keys.first, v + keys.first * head_dim, keys.end - keys.first, head_dim, heads.out);
}

template <typename Element>
void attend_piece(const DecodeCall& call, const Piece& piece, float* top, float* total, float* out) {
  const int64_t group = call.group_size, head_dim = call.head_dim, page_elements = PAGE_SIZE * head_dim;
  const float* q = call.q + piece.row * group * head_dim;
  const int64_t end = piece.first + piece.num_tokens;
  for (int64_t first = piece.first / PAGE_SIZE * PAGE_SIZE; first < end; first += PAGE_SIZE) {
    const Keys keys{static_cast<int>(std::max<int64_t>(0, piece.first - first)),
                    static_cast<int>(std::min<int64_t>(PAGE_SIZE, end - first))};
    const int64_t page = call.pages[piece.row * call.row_pages + first / PAGE_SIZE];
    const Element* k = static_cast<const Element*>(call.k_pool) + page * page_elements;
    const Element* v = static_cast<const Element*>(call.v_pool) + page * page_elements;
    for (int64_t g = 0; g < group; g += HEADS) {
      const Heads heads{q + g * head_dim, top + g, total + g, out + g * head_dim};
      switch (std::min<int64_t>(HEADS, group - g)) {
        case 3: attend_page<3>(heads, k, v, keys, head_dim, call.softcap); break;
        case 2: attend_page<2>(heads, k, v, keys, head_dim, call.softcap); break;
        default: attend_page<1>(heads, k, v, keys, head_dim, call.softcap);
      }
    }
  }
}

// One head of one row out of its pieces [first, end). sink in log2 units, -inf = none.
void merge(const DecodeCall& call, const Partials& partials, size_t first, size_t end, int64_t head, float sink,
           float* out) {
  const int64_t group = call.group_size, head_dim = call.head_dim;
  std::fill_n(out, head_dim, 0.0f);
  if (first == end) return;
  float top = sink;
  for (size_t piece = first; piece < end; ++piece) top = std::max(top, partials.top[piece * group + head]);
  float total = std::exp2(sink - top);
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
    const int64_t oldest = call.window ? std::max<int64_t>(0, call.held[row] - call.window) : 0;
    for (int64_t piece = oldest / PIECE * PIECE; piece < call.held[row]; piece += PIECE) {
      const int64_t first = std::max(piece, oldest);
      pieces.push_back({row, first, std::min<int64_t>(piece + PIECE, call.held[row]) - first});
    }
    starts.push_back(pieces.size());
  }
  Partials partials(pieces.size(), group, head_dim);
  std::atomic<size_t> next{0};
  const int num_threads = static_cast<int>(std::clamp<size_t>(pieces.size(), 1, call.num_threads));
#pragma omp parallel num_threads(num_threads)
  {
    for (size_t i = next++; i < pieces.size(); i = next++)
      attend_piece<Element>(call, pieces[i], &partials.top[i * group], &partials.total[i * group],
                            &partials.out[i * group * head_dim]);
#pragma omp barrier
#pragma omp for collapse(2)
    for (int64_t row = 0; row < call.num_rows; ++row)
      for (int64_t head = 0; head < group; ++head) {
        const float sink = call.sinks ? call.sinks[row % call.num_kv_heads * group + head] * LOG2_E : -INFINITY;
        merge(call, partials, starts[row], starts[row + 1], head, sink, call.out + (row * group + head) * head_dim);
      }
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
