// Block-sparse attention on CPU: one task per (KV head, query heads, query block), the longest list first.
//
// The heads of a task read the same keys, so their rows stand interleaved, row = token * heads + head: positions
// ascend, and a page of keys is loaded once for all of them. fp32 in cpu_panels.h; bf16 through brgemm in cpu_bf16.h,
// and where the processor has no bf16 instructions, widened page by page into fp32.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu_bf16.h"
#include "cpu_panels.h"

using namespace farspan;

namespace {

constexpr int32_t ALL = -1;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr double LN_2 = 0.6931471805599453;

// Rows x head_dim of a task: its queries and sums must stay in a core's L2 beside the pages that pass through.
constexpr int64_t MOST_ELEMENTS = 384 * 64;

}  // namespace

extern "C" {

struct Lists {             // see sparse/selection.py: BlockLists
  const int64_t* starts;   // [H][B]
  const int32_t* counts;   // [H][B]
  const int32_t* indices;  // unit ids
  int64_t unit;            // 0: there is no such part
};

struct AttentionCall {     // mirrored by sparse/kernels/cpu.py
  const void* q;           // [Hq][rows][D], last dimension contiguous
  const void* k_pool;      // [pages][PAGE_SIZE][D]
  const void* v_pool;
  const int32_t* pages;    // [Hkv][num_blocks], -1 = dropped
  void* out;               // [Hq][.][D] as q
  float* lse;              // [Hq][.]
  Lists whole;             // whole pages; unit 0 = dense
  Lists gathered;
  int64_t q_head_stride, q_row_stride;
  int64_t out_rows;        // rows of out and lse per head
  int64_t start, rows;     // positions [start, start + rows)
  int64_t num_heads, num_kv_heads, num_lists, num_blocks, head_dim, query_block;
  float scale;
  int32_t q_is_bf16, pool_is_bf16, use_brgemm, threads;
};

}  // extern "C"

namespace {

struct Task {
  int64_t first_head, num_heads;
  int64_t list;         // index into starts and counts, [H][B] flattened
  int64_t first, last;  // positions of its rows, last included
  int64_t num_keys;     // about how many each row reads: the order of tasks
};

int64_t entry(const Lists& lists, int64_t list, int64_t i) { return lists.indices[lists.starts[list] + i]; }

int32_t num_listed(const Lists& lists, int64_t list) { return lists.unit ? lists.counts[list] : ALL; }

std::vector<Task> plan(const AttentionCall& call) {
  const int64_t group = call.num_heads / std::max(call.num_kv_heads, call.num_lists);
  const int64_t elements = group * std::min(call.query_block, call.rows) * call.head_dim;
  const int64_t parts = std::min(group, (elements + MOST_ELEMENTS - 1) / MOST_ELEMENTS);
  const int64_t heads = (group + parts - 1) / parts;
  const int64_t first_block = call.start / call.query_block;
  const int64_t last_block = (call.start + call.rows - 1) / call.query_block;
  const int64_t num_query_blocks = call.whole.unit ? call.whole_blocks : last_block - first_block + 1;
  std::vector<Task> tasks;
  for (int64_t base = 0; base < call.num_heads; base += group)
    for (int64_t head = base; head < base + group; head += heads)
      for (int64_t block = first_block; block <= last_block; ++block) {
        Task task;
        task.first_head = head;
        task.num_heads = std::min(heads, base + group - head);
        task.list = head * call.num_lists / call.num_heads * num_query_blocks + block - first_block;
        task.first = std::max(call.start, block * call.query_block);
        task.last = std::min(call.start + call.rows, (block + 1) * call.query_block) - 1;
        const int32_t count = num_listed(call.whole, task.list);
        task.num_keys = count == ALL ? task.last + 1 : count * PAGE_SIZE;
        if (count != ALL && call.gathered.unit) task.num_keys += call.gathered.counts[task.list] * call.gathered.unit;
        tasks.push_back(task);
      }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
    return a.num_keys * a.num_heads > b.num_keys * b.num_heads;
  });
  return tasks;
}

}  // namespace
