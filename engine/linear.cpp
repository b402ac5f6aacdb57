// Linear layers on CPU: over a few tokens, as decode needs them, bound by reading the weights once; and over many.
#include "linear_many.h"

namespace {

using namespace farspan;

template <typename Weight>
void run(const LinearCall& call) {
#pragma omp parallel num_threads(call.num_threads)
  share_rows<Weight>(call);
  // Some again, to the same values.
  if (!call.gate && call.num_outputs % ROWS) all_tokens<Weight>(call, later<Weight>(call), call.num_outputs - ROWS);
}

}  // namespace

extern "C" int32_t farspan_lanes() { return LANES; }

extern "C" void farspan_linear(const LinearCall* call) { call->bf16 ? run<uint16_t>(*call) : run<float>(*call); }

// Without gate and residual.
extern "C" void farspan_linear_many(const LinearCall* call) {
  if (!call->bf16) return many_tokens<float, false>(*call);
  call->in_pairs ? many_tokens<uint16_t, true>(*call) : many_tokens<uint16_t, false>(*call);
}
