// autoencoder: what every compiled library checks before it computes.
// efficientad_fast/ops/autoencoder.py is the contract.

#pragma once

#include "autoencoder_layers.h"
#include "checks.h"
#include "packing.h"

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace efficientad_fast::autoencoder {

inline constexpr const char* kName = "autoencoder";
inline constexpr int64_t kSmallestSide = 256;

// Numbers of the largest activation of one image, rounded up to a multiple of 16. channels: outputs of each layer.
inline int64_t largest_activation(const std::array<Layer, kLayers>& layers, const std::vector<int64_t>& channels) {
  int64_t largest = 0, read = 3;
  for (int64_t index = 0; index < kLayers; ++index) {
    const Layer& layer = layers[index];
    for (const int64_t numbers :
         {layer.height * layer.width * read, layer.out_height * layer.out_width * channels[index]}) {
      largest = numbers > largest ? numbers : largest;
    }
    read = channels[index];
  }
  return packing::rounded_up(largest, packing::kChunk);
}

// Numbers that a thread needs: a convolution's workspace, and two activations between which layers alternate.
inline int64_t workspace_size(const std::array<Layer, kLayers>& layers, const std::vector<int64_t>& channels) {
  return packing::kWorkspace + 2 * largest_activation(layers, channels);
}

inline std::string indexed(const char* argument, int64_t index) {
  return std::string(argument) + "[" + std::to_string(index) + "]";
}

inline void check_image(const Tensor& image, bool cuda, bool mixed = false) {
  require_device_kind(kName, "image", image, cuda);
  EFFICIENTAD_FAST_REQUIRE(image.dim() == 4 && (image.size(1) == 3 || (mixed && image.size(1) == 4)), kName, "image",
                           mixed ? "(N, 3, H, W) or (N, 4, H, W)" : "(N, 3, H, W)", shape_text(image));
  if (mixed) {
    const bool known = is_one_of(image.scalar_type(), {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
    EFFICIENTAD_FAST_REQUIRE(known, kName, "image", "float32, float16 or bfloat16", dtype_text(image.scalar_type()));
  } else {
    packing::require_float32(kName, "image", image);
  }
  EFFICIENTAD_FAST_REQUIRE(image.size(2) >= kSmallestSide && image.size(3) >= kSmallestSide, kName, "image",
                           "at least 256x256 pixels", packing::size_text(image.size(2), image.size(3)));
}

inline void check_count(const char* argument, const std::vector<Tensor>& given) {
  EFFICIENTAD_FAST_REQUIRE(static_cast<int64_t>(given.size()) == kLayers, kName, argument,
                           "13 tensors, of enconv1 to enconv6 and deconv1 to deconv7", given.size());
}

// `image` was checked. `size`: of the result.
inline void check_parameters(const Tensor& image, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                             Size size, bool mixed = false) {
  check_count("weights", weights);
  check_count("biases", biases);
  const auto found = layers(image.size(2), image.size(3), size);
  int64_t read = image.size(1);
  for (int64_t index = 0; index < kLayers; ++index) {
    const Tensor& weight = weights[index];
    const std::string name = indexed("weights", index), side = std::to_string(found[index].kernel);
    const bool fitting = weight.dim() == 4 && weight.size(0) >= 1 && weight.size(1) == read &&
                         weight.size(2) == found[index].kernel && weight.size(3) == found[index].kernel;
    EFFICIENTAD_FAST_REQUIRE(fitting, kName, name,
                             "(outputs, " + std::to_string(read) + ", " + side + ", " + side + ")",
                             shape_text(weight));
    if (mixed) {
      packing::check_same_dtype(kName, name.c_str(), weight, "image", image);
    } else {
      packing::require_float32(kName, name.c_str(), weight);
    }
    require_device_of(kName, "image", image, name.c_str(), weight);
    read = weight.size(0);
    packing::check_bias(kName, indexed("biases", index).c_str(), biases[index], read, "image", image);
  }
}

// The default overload.
inline void check(const Tensor& image, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                  const std::vector<int64_t>& size, bool cuda) {
  check_image(image, cuda);
  require_positive_size(kName, size);
  check_parameters(image, weights, biases, {size[0], size[1]});
}

// autoencoder.mixed. Returns the outputs of each layer.
inline std::vector<int64_t> check_mixed(const Tensor& image, const std::vector<Tensor>& weights,
                                        const std::vector<Tensor>& biases, const Tensor& out, const Tensor& workspace,
                                        bool cuda) {
  check_image(image, cuda, /*mixed=*/true);
  EFFICIENTAD_FAST_REQUIRE(out.dim() == 4 && packing::is_positive(out, 1), kName, "out",
                           "(N, C, h, w) with C, h and w of at least 1", shape_text(out));
  const Size size{out.size(2), out.size(3)};
  check_parameters(image, weights, biases, size, /*mixed=*/true);
  std::vector<int64_t> channels;
  for (const Tensor& weight : weights) {
    channels.push_back(weight.size(0));
  }
  const std::string expected =
      text(std::vector<int64_t>{image.size(0), channels.back(), size.height, size.width});
  EFFICIENTAD_FAST_REQUIRE(shape_text(out) == expected, kName, "out", expected, shape_text(out));
  EFFICIENTAD_FAST_REQUIRE(is_one_of(out.scalar_type(), {image.scalar_type(), ScalarType::Float8_e4m3fn}), kName, "out",
                           dtype_text(image.scalar_type()) + " as image is, or float8_e4m3fn",
                           dtype_text(out.scalar_type()));
  EFFICIENTAD_FAST_REQUIRE(is_dense_channels_last(out), kName, "out", "dense and channels-last",
                           "strides " + text(out.strides()));
  require_device_of(kName, "image", image, "out", out);
  const auto parts = mixed_parts(image.size(0), layers(image.size(2), image.size(3), size), channels);
  packing::check_mixed_workspace(kName, workspace, parts[0] + parts[1] + parts[2], "image", image);
  packing::check_same_dtype(kName, "workspace", workspace, "image", image);
  return channels;
}

// autoencoder.out
inline void check_outputs(const Tensor& image, const std::vector<Tensor>& packed, const std::vector<Tensor>& biases,
                          const Tensor& out, const Tensor& workspace, bool cuda) {
  check_image(image, cuda);
  check_count("packed", packed);
  check_count("biases", biases);
  const Tensor& last = biases[kLayers - 1];
  const bool fitting = out.dim() == 4 && out.size(0) == image.size(0) && last.dim() == 1 &&
                       out.size(1) == last.size(0) && packing::is_positive(out, 1);
  EFFICIENTAD_FAST_REQUIRE(fitting, kName, "out",
                           "(" + std::to_string(image.size(0)) + ", C, h, w) with C outputs as biases[12] has",
                           shape_text(out));
  packing::check_activations(kName, "out", out, "image", image);
  const auto found = layers(image.size(2), image.size(3), {out.size(2), out.size(3)});
  std::vector<int64_t> channels;
  int64_t read = 3;
  for (int64_t index = 0; index < kLayers; ++index) {
    const std::string name = indexed("biases", index);
    const Tensor& bias = biases[index];
    EFFICIENTAD_FAST_REQUIRE(bias.dim() == 1 && bias.size(0) >= 1, kName, name, "(outputs,) with at least 1",
                             shape_text(bias));
    const int64_t outputs = bias.size(0);
    packing::check_bias(kName, name.c_str(), bias, outputs, "image", image);
    packing::check_packed(kName, indexed("packed", index).c_str(), packed[index], 1, outputs,
                          {{read, found[index].kernel}}, "image", image, /*direct_alone=*/index < kEncoderLayers);
    channels.push_back(outputs);
    read = outputs;
  }
  packing::check_workspace(kName, workspace, workspace_size(found, channels), "image", image);
}

}  // namespace efficientad_fast::autoencoder
