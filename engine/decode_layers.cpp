// A decoder layer over a few tokens on CPU: all that comes before its attention in one call, all behind it in another.
//
// Threads share the products. What stands between them is done by one: little, for few tokens, beside the weights.
#include <algorithm>
#include <vector>

#include "layers.h"
#include "linear.h"

namespace {

using namespace farspan;

struct Projection {     // mirrored in decode_layers.py
  const void* weight;   // [num_outputs][its inputs]
  const float* scales;  // [num_outputs][its inputs / GROUP] of codes
  const float* bias;    // [num_outputs], or null
  int64_t num_outputs;  // even
};

}  // namespace

extern "C" struct DecoderLayer {  // mirrored in decode_layers.py
  Projection q, k, v, o, gate, up, down;
  const float *input_norm, *mlp_norm;          // [width]
  const float *q_norm, *k_norm;                // [head_dim], or null
  int64_t width, head_dim, rotary;             // rotary: dims of a head that turn, the first ones; 0 = none
  float input_eps, mlp_eps, q_eps, k_eps;      // of the norms
  float share;                                 // of attention and MLP in what they are added to
  int32_t weights;                             // Weights, of all projections
};

namespace {

LinearCall product(const DecoderLayer& layer, const Projection& by, const float* x, void* prepared, int64_t num_inputs,
                   float* out, int64_t num_tokens) {
  LinearCall call{};
  call.x = x, call.prepared = prepared, call.weight = by.weight, call.scales = by.scales, call.bias = by.bias;
  call.out = out;
  call.num_tokens = num_tokens, call.num_inputs = num_inputs, call.num_outputs = by.num_outputs;
  call.weights = layer.weights;
  return call;
}

// Bytes for the inputs of a product, whatever its weights are.
size_t room(int64_t num_tokens, int64_t num_inputs) {
  return std::max(prepared_bytes<Bf16>(num_tokens, num_inputs), prepared_bytes<Code>(num_tokens, num_inputs));
}

LinearCall added_to(const DecoderLayer& layer, const float* residual, LinearCall call) {
  call.residual = residual, call.share = layer.share;
  return call;
}

// Memory of the calling thread, kept for the next call.
template <typename Number>
Number* scratch(size_t count) {
  thread_local std::vector<Number> memory;
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

void norm_rows(const float* x, const float* weight, float* out, int64_t num_rows, int64_t width, float eps) {
  for (int64_t row = 0; row < num_rows; ++row) norm_row(x + row * width, weight, out + row * width, width, eps);
}

// x [num_tokens][heads][head_dim] normed by head and turned, in place.
void finish_heads(const DecoderLayer& layer, const float* norm, float eps, const float* cos, const float* sin, float* x,
                  int64_t num_tokens, int64_t num_heads) {
  if (norm) norm_rows(x, norm, x, num_tokens * num_heads, layer.head_dim, eps);
  if (!layer.rotary) return;
  for (int64_t token = 0; token < num_tokens; ++token)
    for (int64_t head = 0; head < num_heads; ++head) {
      float* one = x + (token * num_heads + head) * layer.head_dim;
      rotate_head(one, cos + token * layer.rotary, sin + token * layer.rotary, one, layer.rotary);
    }
}

template <typename Weight>
void project(const LinearCall (&calls)[3], int num_threads) {
  prepare<Weight>(calls[0]);  // what all three multiply
#pragma omp parallel num_threads(num_threads)
  for (const LinearCall& call : calls) share_rows<Weight>(call);
}

template <typename Weight>
void finish(const DecoderLayer& layer, const LinearCall& o, const LinearCall& gates, const LinearCall& down,
            float* normed, int num_threads) {
  prepare<Weight>(o);
#pragma omp parallel num_threads(num_threads)
  {
    share_rows<Weight>(o);
#pragma omp barrier
#pragma omp single  // the others wait
    {
      norm_rows(o.out, layer.mlp_norm, normed, o.num_tokens, layer.width, layer.mlp_eps);
      prepare<Weight>(gates);
    }
    share_rows<Weight>(gates);
#pragma omp barrier
    if constexpr (IN_BF16<Weight> || IN_CODES<Weight>) {
#pragma omp single
      prepare<Weight>(down);
    }
    share_rows<Weight>(down);
  }
}

}  // namespace

// x [num_tokens][width] -> q [num_tokens][Hq][head_dim], k and v [num_tokens][Hkv][head_dim], after RoPE. cos and sin
// [num_tokens][rotary].
extern "C" void farspan_before_attention(const DecoderLayer* layer, const float* x, const float* cos, const float* sin,
                                         float* q, float* k, float* v, int64_t num_tokens, int64_t num_threads) {
  const int64_t width = layer->width, head_dim = layer->head_dim;
  float* normed = scratch<float>(num_tokens * width);
  char* prepared = scratch<char>(room(num_tokens, width));
  norm_rows(x, layer->input_norm, normed, num_tokens, width, layer->input_eps);
  const LinearCall calls[3] = {product(*layer, layer->q, normed, prepared, width, q, num_tokens),
                               product(*layer, layer->k, normed, prepared, width, k, num_tokens),
                               product(*layer, layer->v, normed, prepared, width, v, num_tokens)};
  switch (layer->weights) {
    case FLOAT32: project<float>(calls, num_threads); break;
    case BF16_WIDENED: project<uint16_t>(calls, num_threads); break;
    case INT8: project<Code>(calls, num_threads); break;
    default: project<Bf16>(calls, num_threads);
  }
  finish_heads(*layer, layer->q_norm, layer->q_eps, cos, sin, q, num_tokens, layer->q.num_outputs / head_dim);
  finish_heads(*layer, layer->k_norm, layer->k_eps, cos, sin, k, num_tokens, layer->k.num_outputs / head_dim);
}

// The layer's output [num_tokens][width], from its input x [num_tokens][width] and attention's [num_tokens][Hq *
// head_dim].
extern "C" void farspan_behind_attention(const DecoderLayer* layer, const float* x, const float* attended, float* out,
                                         int64_t num_tokens, int64_t num_threads) {
  const int64_t width = layer->width, num_gates = layer->gate.num_outputs, num_attended = layer->q.num_outputs;
  float* hidden = scratch<float>(num_tokens * (2 * width + num_gates));  // x and attention's part
  float *normed = hidden + num_tokens * width, *gated = normed + num_tokens * width;
  char* prepared = scratch<char>(room(num_tokens, std::max({width, num_gates, num_attended})));  // one after another
  const LinearCall o = added_to(
      *layer, x, product(*layer, layer->o, attended, prepared, num_attended, hidden, num_tokens));
  LinearCall gates = product(*layer, layer->up, normed, prepared, width, gated, num_tokens);
  gates.gate = layer->gate.weight, gates.gate_scales = layer->gate.scales;
  const LinearCall down = added_to(
      *layer, hidden, product(*layer, layer->down, gated, prepared, num_gates, out, num_tokens));
  switch (layer->weights) {
    case FLOAT32: return finish<float>(*layer, o, gates, down, normed, num_threads);
    case BF16_WIDENED: return finish<uint16_t>(*layer, o, gates, down, normed, num_threads);
    case INT8: return finish<Code>(*layer, o, gates, down, normed, num_threads);
    default: finish<Bf16>(*layer, o, gates, down, normed, num_threads);
  }
}

extern "C" int32_t farspan_lanes() { return LANES; }
