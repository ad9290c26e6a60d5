// autoencoder on the CPU; convolution.h does the work.

#include "autoencoder.h"

#include "conv_pool.h"
#include "convolution_tensors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace efficientad_fast {

namespace {

using namespace convolution;

using Layers = std::array<autoencoder::Layer, autoencoder::kLayers>;

// The layers for one image, each reading what the one before wrote, to and fro between two buffers.
class Network {
 public:
  Network(const Layers& layers, const std::vector<Tensor>& packed, const std::vector<Tensor>& biases,
          const Workspace& workspace, float* buffers, int64_t buffer_size)
      : layers_(layers),
        packed_(packed),
        biases_(biases),
        workspace_(workspace),
        written_(buffers),
        other_(buffers + buffer_size) {}

  void run(Source source, const Result& out) {
    for (std::size_t index = 0; index < layers_.size(); ++index) {
      const autoencoder::Layer& layer = layers_[index];
      if (layer.resized) {
        std::swap(written_, other_);
        resize(source.data, source.height, source.width, source.channels, written_, layer.height, layer.width,
               workspace_.threads);
        source = dense(layer.height, layer.width, source.channels);
      }
      source.kernel = layer.kernel;
      source.padding = layer.padding;
      const int64_t channels = biases_[index].numel();
      const bool last = index == layers_.size() - 1;
      std::swap(written_, other_);
      convolve(source, /*groups=*/1, layer.stride, packed_of(packed_[index]),
               {static_cast<const float*>(biases_[index].const_data_ptr()), layer.relu},
               last ? out : Result{written_, 1, layer.out_height, layer.out_width, channels}, workspace_);
      source = dense(layer.out_height, layer.out_width, channels);
    }
  }

 private:
  // What was written last.
  Source dense(int64_t height, int64_t width, int64_t channels) const {
    return {written_, height * width * channels, width * channels, channels, height, width, channels};
  }

  const Layers& layers_;
  const std::vector<Tensor>& packed_;
  const std::vector<Tensor>& biases_;
  const Workspace workspace_;
  float *written_, *other_;
};

void run(const Tensor& image, const Layers& layers, const std::vector<Tensor>& packed,
         const std::vector<Tensor>& biases, Tensor& out, Tensor& workspace) {
  const Images images(image, layers[0].kernel, layers[0].padding);
  std::vector<Tensor> dense;
  std::vector<int64_t> channels;
  for (const Tensor& bias : biases) {
    dense.push_back(torch::stable::contiguous(bias));
    channels.push_back(bias.numel());
  }
  const int64_t buffer_size = autoencoder::largest_activation(layers, channels);
  const int64_t count = image.size(0);
  const Workspace room = workspace_of(workspace);
  const Result all = result_of(out);
  const auto run_image = [&](int64_t index, int64_t thread, int64_t threads) {
    Source source = images.source;
    source.data += index * source.image;
    const Result result{all.data + index * all.height * all.width * all.channels, 1, all.height, all.width,
                        all.channels};
    float* const own = room.data + thread * room.stride;
    Network(layers, packed, dense, {own, threads, room.stride}, own + kWorkspace, buffer_size).run(source, result);
  };
  const int64_t threads = std::min<int64_t>(room.threads, torch::stable::get_num_threads());
  if (count < threads) {
    for (int64_t index = 0; index < count; ++index) {
      run_image(index, 0, threads);
    }
    return;
  }
  // An image per thread: nobody waits for anybody in the many small layers.
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t index = count * thread / threads; index < count * (thread + 1) / threads; ++index) {
        run_image(index, thread, 1);
      }
    }
  });
}

void autoencoder_out(const Tensor& image, std::vector<Tensor> packed, std::vector<Tensor> biases, Tensor out,
                     Tensor workspace) {
  autoencoder::check_outputs(image, packed, biases, out, workspace, /*cuda=*/false);
  const Layers layers = autoencoder::layers(image.size(2), image.size(3), {out.size(2), out.size(3)});
  run(image, layers, packed, biases, out, workspace);
}

Tensor autoencoder_default(const Tensor& image, std::vector<Tensor> weights, std::vector<Tensor> biases,
                           std::vector<int64_t> size) {
  autoencoder::check(image, weights, biases, size, /*cuda=*/false);
  const Layers layers = autoencoder::layers(image.size(2), image.size(3), {size[0], size[1]});
  std::vector<Tensor> packed;
  std::vector<int64_t> channels;
  for (std::size_t index = 0; index < weights.size(); ++index) {
    const char* const algorithm = index < autoencoder::kEncoderLayers ? "direct" : "auto";
    packed.push_back(packed_weights(weights[index], std::nullopt,
                                    conv_pool::check_pack(weights[index], 1, algorithm, /*cuda=*/false)));
    channels.push_back(weights[index].size(0));
  }
  Tensor out = new_channels_last(image, image.size(0), channels.back(), size[0], size[1]);
  Tensor workspace = new_workspace(image, autoencoder::workspace_size(layers, channels));
  run(image, layers, packed, biases, out, workspace);
  return out;
}

}  // namespace

}  // namespace efficientad_fast

#define EFFICIENTAD_FAST_REGISTER(library)                                         \
  STABLE_TORCH_LIBRARY_IMPL(library, CPU, m) {                                     \
    m.impl("autoencoder", TORCH_BOX(&efficientad_fast::autoencoder_default));      \
    m.impl("autoencoder.out", TORCH_BOX(&efficientad_fast::autoencoder_out));      \
  }
EFFICIENTAD_FAST_REGISTER(efficientad_fast)
EFFICIENTAD_FAST_REGISTER(efficientad_fast_cpu)
