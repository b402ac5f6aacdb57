// Block-sparse attention on CPU: one task per (query heads that share their keys, query block), longest list first.
//
// The heads of a task read the same keys, so their rows stand interleaved and a page is loaded once for all of them.
// fp32 in cpu_panels.h. bf16 in cpu_pairs.h where the processor multiplies pairs of it, in cpu_brgemm.h where it has tiles,
// elsewhere widened page by page into fp32. Codes are widened likewise, into what the rows are multiplied in.
#include <atomic>
#include <vector>

#include "cpu_brgemm.h"
#include "cpu_pairs.h"
#include "cpu_panels.h"

namespace {

using namespace farspan;

constexpr int32_t ALL = -1;

// How bf16 is multiplied.
enum Bf16Products : int32_t { WIDENED, BY_PAIRS, BY_TILES };

// A position before every row's: keys that need no mask are said to start there.
constexpr int64_t PAST = INT32_MIN;

// Rows x head_dim of a task: its queries and sums must stay in a core's L2 beside the pages that pass through.
constexpr int64_t MOST_ELEMENTS = 384 * 64;

}  // namespace

extern "C" {

struct Lists {             // see BlockLists in sparse/selection.py
  const int64_t* starts;   // [H][B]
  const int32_t* counts;   // [H][B]
  const int32_t* indices;  // unit ids
  int64_t unit;            // keys per unit; 0 = there is no such part
};

struct AttentionCall {     // mirrored in cpu.py
  const void* q;           // [Hq][.][D]
  const void* k_pool;      // [num_pages][PAGE_SIZE][D]
  const void* v_pool;
  const float* k_scales;   // [num_pages][PAGE_SIZE] of codes, else null
  const float* v_scales;
  const int32_t* pages;    // [Hkv][num_blocks], -1 = dropped
  void* out;               // [Hq][out_tokens][D] as q
  float* lse;              // [Hq][out_tokens]
  const float* sinks;      // [Hq] natural log, or null
  Lists whole;             // whole pages; unit 0 = every causal key
  Lists gathered;
  int64_t q_head_stride, q_token_stride, out_tokens;
  int64_t start, length;   // the rows at positions [start, start + length)
  int64_t num_heads, num_kv_heads, head_dim, num_blocks;
  int64_t num_lists, num_query_blocks, query_block;
  int64_t window;          // keys that a row sees at most, its own the last; 0 = all. Then no units are gathered
  float scale, softcap;    // softcap 0 = none
  int32_t q_is_bf16, pool_type, bf16_products, num_threads;  // bf16_products: of bf16 queries
};

}  // extern "C"

namespace {

struct Task {
  int64_t first_head, num_heads, kv_head;
  int64_t list;         // [H][B], flattened
  int64_t first, last;  // positions of its rows, the last included
  int64_t oldest;       // block of the first key that a row sees
  int64_t cost;
};

int32_t num_whole(const AttentionCall& call, int64_t list) { return call.whole.unit ? call.whole.counts[list] : ALL; }

std::vector<Task> tasks_of(const AttentionCall& call) {
  const int64_t group = call.num_heads / std::max(call.num_kv_heads, call.num_lists);
  const int64_t elements = group * std::min(call.query_block, call.length) * call.head_dim;
  const int64_t parts = std::clamp<int64_t>((elements + MOST_ELEMENTS - 1) / MOST_ELEMENTS, 1, group);
  const int64_t most_heads = (group + parts - 1) / parts;
  std::vector<Task> tasks;
  for (int64_t base = 0; base < call.num_heads; base += group)
    for (int64_t head = base; head < base + group; head += most_heads)
      for (int64_t block = 0; block < call.num_query_blocks; ++block) {
        const int64_t block_start = (call.start / call.query_block + block) * call.query_block;
        Task task;
        task.first_head = head;
        task.num_heads = std::min(most_heads, base + group - head);
        task.kv_head = head * call.num_kv_heads / call.num_heads;
        task.list = head * call.num_lists / call.num_heads * call.num_query_blocks + block;
        task.first = std::max(call.start, block_start);
        task.last = std::min(call.start + call.length, block_start + call.query_block) - 1;
        if (task.first > task.last) continue;  // only rows behind `length`
        task.oldest = call.window ? std::max<int64_t>(0, task.first - call.window + 1) / PAGE_SIZE : 0;
        const int32_t count = num_whole(call, task.list);
        const int64_t most_keys = task.last + 1 - task.oldest * PAGE_SIZE;
        int64_t num_keys = count == ALL ? most_keys : std::min(most_keys, int64_t{PAGE_SIZE} * count);
        if (count != ALL && call.gathered.unit) num_keys += call.gathered.counts[task.list] * call.gathered.unit;
        task.cost = num_keys * task.num_heads * (task.last - task.first + 1);
        tasks.push_back(task);
      }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return tasks;
}

Logits logits_of(const AttentionCall& call) {
  const float to_log2 = call.scale * LOG2_E;
  return {call.softcap > 0 ? 2 * to_log2 / call.softcap : to_log2, call.softcap * LOG2_E,
          call.window ? static_cast<int32_t>(call.window) : NO_WINDOW};
}

// Element: what pages hold. Wide: what Rows multiply codes as.
template <typename Element, typename Wide, typename Rows>
class Worker {
 public:
  Worker(const AttentionCall& call, int64_t most_rows)
      : call_(call),
        logits_(logits_of(call)),
        page_elements_(PAGE_SIZE * call.head_dim),
        rows_(most_rows, call.head_dim),
        staged_k_(page_elements_),
        staged_v_(page_elements_),
        staged_scales_(2 * PAGE_SIZE),
        wide_(IS_CODE<Element> ? 2 * page_elements_ : 0) {}

  void run(const Task& task) {
    const int64_t offset = task.first - call_.start;
    const int64_t first = task.first_head * call_.q_head_stride + offset * call_.q_token_stride;
    const int64_t place = task.first_head * call_.out_tokens + offset;
    const bool bf16 = call_.q_is_bf16;
    rows_.begin({bf16 ? static_cast<const void*>(static_cast<const uint16_t*>(call_.q) + first)
                      : static_cast<const float*>(call_.q) + first,
                 bf16, call_.q_head_stride, call_.q_token_stride, task.num_heads, task.last - task.first + 1,
                 task.first});
    const int32_t count = num_whole(call_, task.list);
    const int64_t last_block = task.last / PAGE_SIZE;
    if (count == ALL) {
      for (int64_t block = task.oldest; block <= last_block; ++block) read_page(task, block);
    } else {
      const int32_t* blocks = call_.whole.indices + call_.whole.starts[task.list];
      for (int32_t i = 0; i < count && blocks[i] <= last_block; ++i)
        if (blocks[i] >= task.oldest) read_page(task, blocks[i]);
      if (call_.gathered.unit) read_gathered(task);
    }
    rows_.finish({bf16 ? static_cast<void*>(static_cast<uint16_t*>(call_.out) + place * call_.head_dim)
                       : static_cast<float*>(call_.out) + place * call_.head_dim,
                  call_.lse + place, call_.sinks ? call_.sinks + task.first_head : nullptr, bf16, call_.out_tokens});
  }

 private:
  // Keys and values side by side, as pages hold them.
  struct Tokens {
    const Element *k, *v;
    const float *k_scales, *v_scales;  // of codes
  };

  int64_t page_at(const Task& task, int64_t block) const { return call_.pages[task.kv_head * call_.num_blocks + block]; }

  Tokens tokens_at(int64_t page, int64_t offset) const {
    const int64_t place = page * PAGE_SIZE + offset;
    return {static_cast<const Element*>(call_.k_pool) + place * call_.head_dim,
            static_cast<const Element*>(call_.v_pool) + place * call_.head_dim,
            IS_CODE<Element> ? call_.k_scales + place : nullptr, IS_CODE<Element> ? call_.v_scales + place : nullptr};
  }

  void attend(const Tokens& tokens, int64_t first, int num_keys) {
    if constexpr (IS_CODE<Element>) {
      widen(tokens.k, tokens.k_scales, &wide_[0], num_keys, call_.head_dim);
      widen(tokens.v, tokens.v_scales, &wide_[page_elements_], num_keys, call_.head_dim);
      rows_.attend(&wide_[0], &wide_[page_elements_], first, num_keys, logits_);
    } else {
      rows_.attend(tokens.k, tokens.v, first, num_keys, logits_);
    }
  }

  void read_page(const Task& task, int64_t block) {
    const int64_t page = page_at(task, block);
    if (page < 0) return;
    const int64_t first = block * PAGE_SIZE;
    attend(tokens_at(page, 0), first, static_cast<int>(std::min<int64_t>(PAGE_SIZE, task.last - first + 1)));
  }

  // Units are copied side by side into a page, which is then read like any other.
  void read_gathered(const Task& task) {
    const Lists& lists = call_.gathered;
    const int64_t start = lists.starts[task.list];
    const Tokens stage = {&staged_k_[0], &staged_v_[0], &staged_scales_[0], &staged_scales_[PAGE_SIZE]};
    int64_t staged = 0;  // keys
    for (int32_t i = 0; i < lists.counts[task.list]; ++i) {
      const int64_t position = lists.indices[start + i] * lists.unit;
      const int64_t page = page_at(task, position / PAGE_SIZE);
      if (page < 0) continue;
      const Tokens from = tokens_at(page, position % PAGE_SIZE);
      std::copy_n(from.k, lists.unit * call_.head_dim, &staged_k_[staged * call_.head_dim]);
      std::copy_n(from.v, lists.unit * call_.head_dim, &staged_v_[staged * call_.head_dim]);
      if constexpr (IS_CODE<Element>) {
        std::copy_n(from.k_scales, lists.unit, &staged_scales_[staged]);
        std::copy_n(from.v_scales, lists.unit, &staged_scales_[PAGE_SIZE + staged]);
      }
      staged += lists.unit;
      if (staged == PAGE_SIZE) {
        attend(stage, PAST, PAGE_SIZE);
        staged = 0;
      }
    }
    if (staged) attend(stage, PAST, static_cast<int>(staged));
  }

  const AttentionCall& call_;
  Logits logits_;
  int64_t page_elements_;
  Rows rows_;
  Buffer<Element> staged_k_, staged_v_;
  Buffer<float> staged_scales_;  // [2][PAGE_SIZE]
  Buffer<Wide> wide_;            // [2][PAGE_SIZE][D]: what a page of codes means
};

template <typename Element, typename Wide, typename Rows>
void run_all(const AttentionCall& call) {
  const std::vector<Task> tasks = tasks_of(call);
  int64_t most_rows = 0;
  for (const Task& task : tasks) most_rows = std::max(most_rows, task.num_heads * (task.last - task.first + 1));
  std::atomic<size_t> next{0};
  const int num_threads = static_cast<int>(std::min<size_t>(call.num_threads, tasks.size()));
#pragma omp parallel num_threads(num_threads)
  {
    Worker<Element, Wide, Rows> worker(call, most_rows);
    for (size_t i = next++; i < tasks.size(); i = next++) worker.run(tasks[i]);
  }
}

// Of pages that are bf16 or become it.
template <typename Element>
void run_pages(const AttentionCall& call) {
  switch (call.bf16_products) {
    case BY_PAIRS: return run_all<Element, uint16_t, PairRows>(call);
    case BY_TILES: return run_all<Element, uint16_t, BrgemmRows>(call);
    default: return run_all<Element, float, PanelRows>(call);
  }
}

}  // namespace

extern "C" void farspan_attend(const AttentionCall* call) {
  switch (call->pool_type) {
    case POOL_FP32: return run_all<float, float, PanelRows>(*call);
    case POOL_INT8: return run_pages<int8_t>(*call);
    case POOL_FP8: return run_pages<Fp8>(*call);
    default: return run_pages<uint16_t>(*call);
  }
}
