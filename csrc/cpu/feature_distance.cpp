// feature_distance on the CPU; convolution.h does the work.

#include "feature_distance.h"

#include "convolution_tensors.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <string>

namespace efficientad_fast {

namespace {

using namespace convolution;

void run(const Tensor& first, const std::optional<Tensor>& second, const Tensor& packed,
         const std::optional<Tensor>& bias, int64_t channels, int64_t kernel_first, int64_t kernel_second,
         int64_t padding_first, int64_t padding_second, Tensor& out, Tensor& workspace) {
  const Images images(first, kernel_first, padding_first);
  const std::optional<Images> others = second ? std::optional<Images>(std::in_place, *second, kernel_second, padding_second)
                                              : std::nullopt;
  const DenseNumbers biases(bias);
  distance(images.source, others ? others->source : Source{}, packed_of(packed), biases.data(), channels,
           result_of(out), workspace_of(workspace));
}

void feature_distance_out(const Tensor& first, std::optional<Tensor> second, const Tensor& packed,
                          std::optional<Tensor> bias, int64_t channels, int64_t kernel_first, int64_t kernel_second,
                          int64_t padding_first, int64_t padding_second, Tensor out, Tensor workspace) {
  feature_distance::check_outputs(first, second, packed, bias, channels, kernel_first, kernel_second, padding_first,
                                  padding_second, out, workspace, /*cuda=*/false);
  run(first, second, packed, bias, channels, kernel_first, kernel_second, padding_first, padding_second, out, workspace);
}

Tensor feature_distance_pack(const Tensor& weight_first, std::optional<Tensor> weight_second, std::string algorithm) {
  return packed_weights(weight_first, weight_second,
                        feature_distance::check_pack(weight_first, weight_second, algorithm, /*cuda=*/false));
}

Tensor feature_distance_default(const Tensor& first, const Tensor& weight_first, std::optional<Tensor> second,
                                std::optional<Tensor> weight_second, std::optional<Tensor> bias, int64_t padding_first,
                                int64_t padding_second) {
  const auto size = feature_distance::check(first, weight_first, second, weight_second, bias, padding_first,
                                            padding_second, /*cuda=*/false);
  Tensor out = torch::stable::new_empty(first, {first.size(0), 1, size.height, size.width});
  Tensor workspace = new_workspace(first, kWorkspace);
  run(first, second, feature_distance_pack(weight_first, weight_second, "auto"), bias, weight_first.size(0),
      weight_first.size(2), weight_second ? weight_second->size(2) : 0, padding_first, padding_second, out, workspace);
  return out;
}

}  // namespace

}  // namespace efficientad_fast

#define EFFICIENTAD_FAST_REGISTER(library)                                                   \
  STABLE_TORCH_LIBRARY_IMPL(library, CPU, m) {                                               \
    m.impl("feature_distance", TORCH_BOX(&efficientad_fast::feature_distance_default));      \
    m.impl("feature_distance.out", TORCH_BOX(&efficientad_fast::feature_distance_out));      \
    m.impl("feature_distance.pack", TORCH_BOX(&efficientad_fast::feature_distance_pack));    \
  }
EFFICIENTAD_FAST_REGISTER(efficientad_fast)
EFFICIENTAD_FAST_REGISTER(efficientad_fast_cpu)
