// What stands between the matrix products of a layer, on CPU in float32: each in one pass over memory.
//
// Every token is worked on alone, so a result never depends on batch mates or threads.
#include "layers.h"

namespace {

using namespace farspan;

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int64_t SHARED = 1 << 15;  // floats: fewer are done before other threads have woken up

int team(int64_t elements, int64_t num_threads) { return elements < SHARED ? 1 : static_cast<int>(num_threads); }

}  // namespace

// out [rows][width] = x / sqrt(mean(x^2) + eps) * weight [width]. width: whole vectors.
extern "C" void farspan_rms_norm(const float* x, const float* weight, float* out, int64_t num_rows, int64_t width,
                                 float eps, int64_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(team(num_rows* width, num_threads))
  for (int64_t row = 0; row < num_rows; ++row)
    norm_row(x + row * width, weight, out + row * width, width, eps);
}

// out [n] = gate * sigmoid(gate) * up. n: whole vectors.
extern "C" void farspan_silu_mul(const float* gate, const float* up, float* out, int64_t n, int64_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(team(n, num_threads))
  for (int64_t i = 0; i < n; i += LANES) {
    const Floats x = load(gate + i);
    const Floats exponent = -larger(x * LOG2_E, splat(-126.0f));  // exp2 serves no more
    store(out + i, x / (1.0f + exp2(exponent)) * load(up + i));
  }
}

struct Rotated {       // mirrored in layers.py
  const float* x;      // [heads][tokens][head_dim], of these strides
  float* out;          // [heads][tokens][head_dim]
  int64_t num_heads, head_stride, token_stride;
};

// Pairs of halves of the first `rotary` dims turned; the others copied. cos and sin [tokens][rotary]; rotary / 2: whole
// vectors.
extern "C" void farspan_rotate(const Rotated* parts, int64_t num_parts, const float* cos, const float* sin,
                               int64_t num_tokens, int64_t head_dim, int64_t rotary, int64_t num_threads) {
  int64_t heads = 0;
  for (int64_t i = 0; i < num_parts; ++i) heads += parts[i].num_heads;
#pragma omp parallel for schedule(static) num_threads(team(heads* num_tokens* head_dim, num_threads))
  for (int64_t token = 0; token < num_tokens; ++token)
    for (int64_t part = 0; part < num_parts; ++part)
      for (int64_t head = 0; head < parts[part].num_heads; ++head) {
        const Rotated& p = parts[part];
        const float* from = p.x + head * p.head_stride + token * p.token_stride;
        float* to = p.out + (head * num_tokens + token) * head_dim;
        rotate_head(from, cos + token * rotary, sin + token * rotary, to, rotary);
        std::copy(from + rotary, from + head_dim, to + rotary);
      }
}

extern "C" int32_t farspan_lanes() { return LANES; }
