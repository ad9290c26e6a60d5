// autoencoder: its layers, without framework types.
// efficientad_fast/ops/autoencoder.py is the contract, efficientad_fast/reference/networks.py has the networks.

#pragma once

#include "size.h"

#include <array>
#include <cstdint>

namespace efficientad_fast::autoencoder {

inline constexpr int64_t kLayers = 13, kEncoderLayers = 6;

// Parts of a workspace in mixed precision are multiples of so many numbers.
inline constexpr int64_t kPartMultiple = 16;

// A convolution of one image. In the decoder, what it reads was resized to `height` and `width` before.
struct Layer {
  int64_t kernel = 1, stride = 1, padding = 0;
  bool resized = false, relu = true;
  int64_t height = 0, width = 0;          // of what the convolution reads
  int64_t out_height = 0, out_width = 0;  // and of what it writes
};

// enconv1 to enconv6, deconv1 to deconv7.
inline std::array<Layer, kLayers> layers(int64_t height, int64_t width, Size size) {
  std::array<Layer, kLayers> found;
  const int64_t divisors[] = {64, 32, 16, 8, 4, 2};
  Size input{height, width};
  for (int64_t index = 0; index < kLayers; ++index) {
    Layer& layer = found[index];
    if (index < kEncoderLayers - 1) {
      layer = {4, 2, 1, false, true};
    } else if (index == kEncoderLayers - 1) {
      layer = {8, 1, 0, false, false};
    } else if (index < kLayers - 1) {
      const int64_t step = index - kEncoderLayers;
      const int64_t odd = step % 2 == 0 || step == 5;
      layer = {4, 1, 2, true, true};
      input = {height / divisors[step] - odd, width / divisors[step] - odd};
    } else {
      layer = {3, 1, 1, true, true};
      input = size;
    }
    layer.height = input.height;
    layer.width = input.width;
    layer.out_height = (input.height + 2 * layer.padding - layer.kernel) / layer.stride + 1;
    layer.out_width = (input.width + 2 * layer.padding - layer.kernel) / layer.stride + 1;
    input = {layer.out_height, layer.out_width};
  }
  return found;
}

// Numbers of the three parts of the workspace of `mixed`: two into which layers write in turn, and one for what is
// resized. channels: outputs of each layer.
template <typename Channels>
std::array<int64_t, 3> mixed_parts(int64_t images, const std::array<Layer, kLayers>& layers, const Channels& channels) {
  std::array<int64_t, 3> parts{};
  const auto enlarge = [](int64_t& part, int64_t numbers) { part = numbers > part ? numbers : part; };
  for (int64_t index = 0; index < kLayers; ++index) {
    const Layer& layer = layers[index];
    if (layer.resized) {
      enlarge(parts[2], images * layer.height * layer.width * channels[index - 1]);
    }
    if (index < kLayers - 1) {
      enlarge(parts[index % 2], images * layer.out_height * layer.out_width * channels[index]);
    }
  }
  for (int64_t& part : parts) {
    part = (part + kPartMultiple - 1) / kPartMultiple * kPartMultiple;
  }
  return parts;
}

}  // namespace efficientad_fast::autoencoder
