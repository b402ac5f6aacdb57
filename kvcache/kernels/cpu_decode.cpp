// Decode attention on CPU: one query token per sequence over the pages its rows hold, bound by reading them once.
//
// A row (sequence, KV head) is cut into pieces of PIECE tokens, always at the same places, so that threads share a
// long row and a result depends on neither batch mates nor threads. The G query heads of a row read a tile of PAGE_SIZE
// tokens together: a page or, where a selection says what is read, the next units that it names. A selection of all
// that a row holds computes what no selection does, bit for bit.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "native.h"

namespace {

using namespace farspan;

constexpr int64_t PIECE = 4 * PAGE_SIZE;
constexpr int UNIT = 16;  // tokens that always lie side by side
constexpr int TILE_UNITS = PAGE_SIZE / UNIT;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr int KEYS = 4;   // keys scored together, and
constexpr int HEADS = 3;  // query heads: 4 x 3 sums, 3 vectors of queries and one of keys fill the registers of AVX2

}  // namespace

extern "C" struct DecodeCall {  // mirrored in cpu.py
  const float* q;               // [B][Hq][D]
  const void* k_pool;           // [num_pages][PAGE_SIZE][D]
  const void* v_pool;
  const float* k_scales;        // [num_pages][PAGE_SIZE] of codes, else null
  const float* v_scales;
  const int32_t* pages;         // [B][Hkv][row_pages]
  const int32_t* held;          // [B][Hkv]
  const float* sinks;           // [Hq] natural log, or null
  const int32_t* unit_ids;      // [B][Hkv][row_units] of units of `unit` tokens, ascending
  const int32_t* unit_counts;   // [B][Hkv]; null = all is read
  float* out;                   // [B][Hq][D]
  int64_t num_rows, num_kv_heads, group_size, head_dim, row_pages;  // num_rows = B * Hkv
  int64_t row_units, unit;      // unit is UNIT or PAGE_SIZE
  int64_t window;               // the last tokens of a row that are read, 0 = all; not with a selection
  float scale;                  // of queries times keys, times log2(e)
  float softcap;                // 0 = none
  int32_t pool_type, num_threads;
};

namespace {

struct Piece {  // counted in the tokens that the row reads
  int64_t row, first, num_tokens;
};

// Which keys of a tile count: [first, end).
struct Keys {
  int first, end;
};

// Where the units of a tile begin.
template <typename Element>
struct Tile {
  const Element* k[TILE_UNITS];
  const Element* v[TILE_UNITS];
  const float* k_scales[TILE_UNITS];  // of codes
  const float* v_scales[TILE_UNITS];
};

// to [KEYS] = the sum of each.
inline void store_sums(const Floats (&sums)[KEYS], float* to) {
  static_assert(KEYS == 4);
#if defined(__AVX512F__) && FARSPAN_LANES == 16
  const auto pairs = [](__m512 a, __m512 b) {  // in each quarter: a b a b, each in two parts
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const __m512d even = _mm512_castps_pd(pairs(sums[0], sums[1])), odd = _mm512_castps_pd(pairs(sums[2], sums[3]));
  const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
                                        _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  const __m512 halves = _mm512_add_ps(quarters, _mm512_shuffle_f32x4(quarters, quarters, 0b01001110));
  _mm_storeu_ps(to, _mm_add_ps(_mm512_castps512_ps128(halves), _mm512_extractf32x4_ps(halves, 1)));
#elif defined(__AVX__) && FARSPAN_LANES == 8
  const auto halves = [](__m256 a, __m256 b) {  // a's in the low half, b's in the high one
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const __m256 even = halves(sums[0], sums[2]), odd = halves(sums[1], sums[3]);
  const __m256 pairs = _mm256_add_ps(_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd));
  // Sums 0 1 0 1 | 2 3 2 3, each in two parts.
  const __m128 low = _mm256_castps256_ps128(pairs), high = _mm256_extractf128_ps(pairs, 1);
  _mm_storeu_ps(to, _mm_add_ps(_mm_movelh_ps(low, high), _mm_movehl_ps(high, low)));
#else
  for (int i = 0; i < KEYS; ++i) to[i] = sum_of(sums[i]);
#endif
}

// scores [HEAD_COUNT][PAGE_SIZE] of KEYS keys. q [HEAD_COUNT][D], k [KEYS][D]
template <int HEAD_COUNT, typename Element>
inline void score_keys(const float* q, const Element* k, int64_t head_dim, float* scores) {
  Floats sums[HEAD_COUNT][KEYS];
  for (int g = 0; g < HEAD_COUNT; ++g)
    for (int i = 0; i < KEYS; ++i) sums[g][i] = Floats{};
  for (int64_t d = 0; d < head_dim; d += LANES) {
    Floats queries[HEAD_COUNT];
    for (int g = 0; g < HEAD_COUNT; ++g) queries[g] = held(load(q + g * head_dim + d));
    for (int i = 0; i < KEYS; ++i) {
      const Floats key = held(load(k + i * head_dim + d));
      for (int g = 0; g < HEAD_COUNT; ++g) sums[g][i] += queries[g] * key;
    }
  }
  for (int g = 0; g < HEAD_COUNT; ++g) store_sums(sums[g], scores + g * PAGE_SIZE);
}

// out [HEAD_COUNT][D] += weights [HEAD_COUNT][PAGE_SIZE] times the values of a tile, VECTORS vectors of D from `d` on.
template <int HEAD_COUNT, int VECTORS, typename Element>
inline void add_columns(const float* weights, const Tile<Element>& tile, Keys keys, int64_t d, int64_t head_dim,
                        float* out) {
  Floats sums[HEAD_COUNT][VECTORS];
  for (int g = 0; g < HEAD_COUNT; ++g)
    for (int j = 0; j < VECTORS; ++j) sums[g][j] = load(out + g * head_dim + d + j * LANES);
  for (int key = keys.first; key < keys.end;) {
    const int unit = key / UNIT, end = std::min((unit + 1) * UNIT, keys.end);
    const Element* v = tile.v[unit] + key % UNIT * head_dim + d;
    for (; key < end; ++key, v += head_dim) {
      Floats shares[HEAD_COUNT];
      for (int g = 0; g < HEAD_COUNT; ++g) shares[g] = held(splat(weights[g * PAGE_SIZE + key]));
      for (int j = 0; j < VECTORS; ++j) {
        const Floats values = held(load(v + j * LANES));
        for (int g = 0; g < HEAD_COUNT; ++g) sums[g][j] += shares[g] * values;
      }
    }
  }
  for (int g = 0; g < HEAD_COUNT; ++g)
    for (int j = 0; j < VECTORS; ++j) store(out + g * head_dim + d + j * LANES, sums[g][j]);
}

template <int HEAD_COUNT, typename Element>
void add_values(const float* weights, const Tile<Element>& tile, Keys keys, int64_t head_dim, float* out) {
  constexpr int64_t COLUMNS = 4 * LANES;
  int64_t d = 0;
  for (; d + COLUMNS <= head_dim; d += COLUMNS) add_columns<HEAD_COUNT, 4>(weights, tile, keys, d, head_dim, out);
  for (; d < head_dim; d += LANES) add_columns<HEAD_COUNT, 1>(weights, tile, keys, d, head_dim, out);
}

// Scores or weights [PAGE_SIZE] over codes become those over what they mean: one product a token, not one a number.
inline void apply(const float* const* scales, float* scores) {
  for (int key = 0; key < PAGE_SIZE; key += LANES)
    store(scores + key, load(scores + key) * load(scales[key / UNIT] + key % UNIT));
}

// Caps one head's scores [PAGE_SIZE], log2.
void cap(float* scores, float softcap) {
  for (int key = 0; key < PAGE_SIZE; key += LANES)
    store(scores + key, softcap * LOG2_E * tanh_of_half(load(scores + key) * (2 / softcap)));
}

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

// Bring memory closer that is read soon: a page is too short for the processor to guess it by itself. Codes to L1,
// where two tiles of wider numbers have no room.
template <typename Element>
inline void fetch(const Element* from, int64_t count) {
  constexpr int64_t LINE = 64 / sizeof(Element);
  for (int64_t i = 0; i < count; i += LINE) __builtin_prefetch(from + i, 0, IS_CODE<Element> ? 3 : 2);
}

// A part of a tile: `count` tokens of a unit.
template <typename Element>
inline void fetch_tokens(const Tile<Element>& tile, int unit, int token, int64_t count, int64_t head_dim) {
  fetch(tile.k[unit] + token * head_dim, count * head_dim);
  fetch(tile.v[unit] + token * head_dim, count * head_dim);
  if constexpr (IS_CODE<Element>) {
    if (token == 0) {  // a unit's scales are a line
      __builtin_prefetch(tile.k_scales[unit]);
      __builtin_prefetch(tile.v_scales[unit]);
    }
  }
}

template <int HEAD_COUNT, typename Element>
void attend_tile(const Heads& heads, const Tile<Element>& tile, const Tile<Element>* soon, Keys keys, int64_t head_dim,
                 float softcap) {
  alignas(64) float scores[HEAD_COUNT * PAGE_SIZE];
  for (int key = keys.first / KEYS * KEYS; key < keys.end;) {  // and a few at either end that do not count
    const int unit = key / UNIT, end = std::min((unit + 1) * UNIT, keys.end);
    const Element* k = tile.k[unit] + key % UNIT * head_dim;
    for (; key < end; key += KEYS, k += KEYS * head_dim) {
      if (soon) fetch_tokens(*soon, unit, key % UNIT, KEYS, head_dim);
      score_keys<HEAD_COUNT>(heads.q, k, head_dim, scores + key);
    }
  }
  for (int g = 0; g < HEAD_COUNT; ++g) {
    if constexpr (IS_CODE<Element>) apply(tile.k_scales, scores + g * PAGE_SIZE);
    if (softcap > 0) cap(scores + g * PAGE_SIZE, softcap);
    to_weights(scores + g * PAGE_SIZE, keys, head_dim, heads.top[g], heads.total[g], heads.out + g * head_dim);
    if constexpr (IS_CODE<Element>) apply(tile.v_scales, scores + g * PAGE_SIZE);
  }
  add_values<HEAD_COUNT>(scores, tile, keys, head_dim, heads.out);
}

// The tokens that a row reads.
int64_t num_read(const DecodeCall& call, int64_t row) {
  if (!call.unit_counts) return call.held[row];
  const int64_t count = call.unit_counts[row];
  if (!count) return 0;
  const int64_t end = (call.unit_ids[row * call.row_units + count - 1] + 1) * call.unit;
  return count * call.unit - std::max<int64_t>(0, end - call.held[row]);  // only the newest unit is not full
}

// The tile that begins at token `first` of those that a row reads; units that hold none of them repeat the last one.
template <typename Element>
Tile<Element> tile_at(const DecodeCall& call, int64_t row, int64_t first, int64_t end) {
  Tile<Element> tile;
  for (int i = 0; i < TILE_UNITS; ++i) {
    int64_t place = std::min(first + i * UNIT, (end - 1) / UNIT * UNIT);
    if (call.unit_counts) place = call.unit_ids[row * call.row_units + place / call.unit] * call.unit + place % call.unit;
    const int64_t page = call.pages[row * call.row_pages + place / PAGE_SIZE];
    const int64_t token = page * PAGE_SIZE + place % PAGE_SIZE;
    tile.k[i] = static_cast<const Element*>(call.k_pool) + token * call.head_dim;
    tile.v[i] = static_cast<const Element*>(call.v_pool) + token * call.head_dim;
    if constexpr (IS_CODE<Element>) {
      tile.k_scales[i] = call.k_scales + token;
      tile.v_scales[i] = call.v_scales + token;
    }
  }
  return tile;
}

// then: what this thread probably reads behind it, or null.
template <typename Element>
void attend_piece(const DecodeCall& call, const Piece& piece, const Piece* then, float* top, float* total, float* out) {
  const int64_t group = call.group_size, head_dim = call.head_dim;
  const float* q = call.q + piece.row * group * head_dim;
  const int64_t end = piece.first + piece.num_tokens;
  int64_t first = piece.first / PAGE_SIZE * PAGE_SIZE;
  Tile<Element> tile = tile_at<Element>(call, piece.row, first, end), soon;
  for (; first < end; first += PAGE_SIZE, tile = soon) {
    const bool is_last = first + PAGE_SIZE >= end;
    if (!is_last) soon = tile_at<Element>(call, piece.row, first + PAGE_SIZE, end);
    if (is_last && then)
      soon = tile_at<Element>(call, then->row, then->first / PAGE_SIZE * PAGE_SIZE, then->first + then->num_tokens);
    const bool has_soon = !is_last || then;
    const Keys keys{static_cast<int>(std::max<int64_t>(0, piece.first - first)),
                    static_cast<int>(std::min<int64_t>(PAGE_SIZE, end - first))};
    for (int64_t g = 0; g < group; g += HEADS) {
      const Heads heads{q + g * head_dim, top + g, total + g, out + g * head_dim};
      const Tile<Element>* next = has_soon && g == 0 ? &soon : nullptr;
      switch (std::min<int64_t>(HEADS, group - g)) {
        case 3: attend_tile<3>(heads, tile, next, keys, head_dim, call.softcap); break;
        case 2: attend_tile<2>(heads, tile, next, keys, head_dim, call.softcap); break;
        default: attend_tile<1>(heads, tile, next, keys, head_dim, call.softcap);
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
void run(DecodeCall call) {
  const int64_t group = call.group_size, head_dim = call.head_dim;
  std::vector<float> queries(call.q, call.q + call.num_rows * group * head_dim);
  for (float& x : queries) x *= call.scale;
  call.q = queries.data();
  std::vector<Piece> pieces;
  std::vector<size_t> starts{0};  // of each row's pieces
  for (int64_t row = 0; row < call.num_rows; ++row) {
    const int64_t length = num_read(call, row);
    const int64_t oldest = call.window ? std::max<int64_t>(0, length - call.window) : 0;
    for (int64_t piece = oldest / PIECE * PIECE; piece < length; piece += PIECE) {
      const int64_t first = std::max(piece, oldest);
      pieces.push_back({row, first, std::min<int64_t>(piece + PIECE, length) - first});
    }
    starts.push_back(pieces.size());
  }
  Partials partials(pieces.size(), group, head_dim);
  std::atomic<size_t> next{0};
  const int num_threads = static_cast<int>(std::clamp<size_t>(pieces.size(), 1, call.num_threads));
#pragma omp parallel num_threads(num_threads)
  {
    for (size_t i = next++; i < pieces.size(); i = next++) {
      const Piece* then = i + num_threads < pieces.size() ? &pieces[i + num_threads] : nullptr;
      attend_piece<Element>(call, pieces[i], then, &partials.top[i * group], &partials.total[i * group],
                            &partials.out[i * group * head_dim]);
    }
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
  switch (call->pool_type) {
    case POOL_FP32: return run<float>(*call);
    case POOL_INT8: return run<int8_t>(*call);
    case POOL_FP8: return run<Fp8>(*call);
    default: run<uint16_t>(*call);
  }
}

extern "C" int64_t farspan_lanes() { return LANES; }
