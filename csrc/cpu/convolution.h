// Convolutions of float32 images in channels-last memory, by Winograd's filtering or directly: what conv_pool,
// feature_distance and autoencoder have in common. docs/kernels.md explains them.
//
// The work is cut into blocks of rows: tiles of outputs for Winograd, single outputs else. A thread takes a block through
// three steps, and what passes between them stays in its second-level cache: gather (read, transform), multiply by
// the packed weights of 32 outputs at a time, and finish (transform back, bias, ReLU, pooling, or squares), which writes.

#pragma once

#include "packing.h"

#include <cstdint>

namespace efficientad_fast::convolution {

using packing::kChunk;  // input channels that lie together in what is multiplied: a cache line
using packing::kPanel;
using packing::kWorkspace;
using packing::rounded_up;

inline constexpr int64_t divided_up(int64_t number, int64_t divisor) {
  return (number + divisor - 1) / divisor;
}

// Images to be read. Channels are neighbours in memory; strides count numbers.
struct Source {
  const float* data = nullptr;
  int64_t image = 0, row = 0, pixel = 0;  // strides
  int64_t height = 0, width = 0, channels = 0;
  int64_t kernel = 1, padding = 0;
};

// How outputs become results.
struct Epilogue {
  const float* bias = nullptr;
  bool relu = false;
  bool pool = false;
  int64_t pool_padding = 0;
};

// Packed weights (groups, panels, planes, depth, kPanel), as efficientad_fast/ops/packing.py describes them.
struct Packed {
  const float* data = nullptr;
  int64_t panels = 0, planes = 0, depth = 0;
};

// Dense results (images, height, width, channels).
struct Result {
  float* data = nullptr;
  int64_t images = 0, height = 0, width = 0, channels = 0;
};

// Room for `threads` threads, `stride` numbers apart, kWorkspace of which each may use.
struct Workspace {
  float* data = nullptr;
  int64_t threads = 1, stride = 0;
};

// Result channels are shared out to `groups`, which read `source.channels` each, one after the other.
void convolve(const Source& source, int64_t groups, int64_t stride, const Packed& packed, const Epilogue& epilogue,
              const Result& result, const Workspace& workspace);

// result (one channel) = mean over `channels` of the square of the sum over both sources (the second may have no data).
void distance(const Source& first, const Source& second, const Packed& packed, const float* bias, int64_t channels,
              const Result& result, const Workspace& workspace);

// One group's weights (outputs, channels, kernel, kernel), to be packed.
struct Weights {
  const float* data = nullptr;
  int64_t outputs = 0, channels = 0, kernel = 1;
  int64_t filter = 1;  // the largest kernel among the sources that are added
  double scale = 1;
  int64_t first = 0;  // where in the depth they begin
};

// Into `packed`, which holds zeros and is laid out as `layout` says.
void pack(const Weights& weights, const Packed& layout, float* packed);

// Bilinear (align_corners=False), dense images with `channels` channels.
void resize(const float* from, int64_t height, int64_t width, int64_t channels, float* to, int64_t to_height,
            int64_t to_width, int64_t threads);

}  // namespace efficientad_fast::convolution
