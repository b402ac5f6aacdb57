// What stands between the matrix products of a layer, for one token: what layers.cpp and decode_layers.cpp share.
#pragma once
#include <algorithm>
#include <cmath>

#include "native.h"

namespace farspan {

// to [width] = from / sqrt(mean(from^2) + eps) * weight [width]. width: whole vectors. `to` may be `from`.
inline void norm_row(const float* from, const float* weight, float* to, int64_t width, float eps) {
  Floats squares{};
  for (int64_t i = 0; i < width; i += LANES) squares += load(from + i) * load(from + i);
  const float scale = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + eps);
  for (int64_t i = 0; i < width; i += LANES) store(to + i, load(from + i) * scale * load(weight + i));
}

// Pairs of halves of the first `rotary` dims of a head turned by cos and sin [rotary]. rotary / 2: whole vectors. `to`
// may be `from`; the other dims are left as they are there.
inline void rotate_head(const float* from, const float* cos, const float* sin, float* to, int64_t rotary) {
  const int64_t half = rotary / 2;
  for (int64_t d = 0; d < half; d += LANES) {
    const Floats first = load(from + d), second = load(from + half + d);
    store(to + d, first * load(cos + d) - second * load(sin + d));
    store(to + half + d, second * load(cos + half + d) + first * load(sin + half + d));
  }
}

}  // namespace farspan
