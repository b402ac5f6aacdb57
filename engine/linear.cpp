// Linear layers on CPU: over a few tokens, as decode needs them, bound by reading the weights once; and over many.
#include <vector>

#include "linear_many.h"

namespace {

using namespace farspan;

template <typename Weight>
void run(LinearCall call) {
  std::vector<char> prepared(prepared_bytes<Weight>(call.num_tokens, call.num_inputs));
  call.prepared = prepared.data();
  prepare<Weight>(call);
#pragma omp parallel num_threads(call.num_threads)
  share_rows<Weight>(call);
  // Some again, to the same values.
  if (!call.gate && call.num_outputs % ROWS) all_tokens<Weight>(call, later<Weight>(call), call.num_outputs - ROWS);
}

}  // namespace

extern "C" int32_t farspan_lanes() { return LANES; }

extern "C" void farspan_linear(const LinearCall* call) {
  switch (call->weights) {
    case FLOAT32: return run<float>(*call);
    case BF16_WIDENED: return run<uint16_t>(*call);
    case INT8: return run<Code>(*call);
    default: run<Bf16>(*call);
  }
}

// Without gate and residual.
extern "C" void farspan_linear_many(const LinearCall* call) {
  switch (call->weights) {
    case FLOAT32: return many_tokens<float>(*call);
    case BF16_WIDENED: return many_tokens<uint16_t>(*call);
    case INT8: return many_tokens<Code>(*call);
    default: many_tokens<Bf16>(*call);
  }
}
