// What efficientad_fast/plan (folding.py, operators.py) does in Python: weights are folded and packed once, and a
// prediction is a list of operators over buffers that are kept.
//
// Operators with packed weights, because those that take plain ones pack them again in each call. Teacher and student
// run one after the other: stacked into one, as there, they took as long on a CPU. The operators are called through
// PyTorch's dispatcher by its stable ABI, so that a program which was built with one release runs with later ones.

#include "detector.h"

#include "safetensors.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <utility>

namespace efficientad {

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSmallestSide = 256, kLargestSide = 4096;
constexpr int64_t kMostChannels = 4096;
constexpr int64_t kBorder = 4;  // features that padding would add on each side

// Arguments in the order of efficientad_fast/ops/schemas.inc, all of them. The first result, where there is one.
template <typename... Arguments>
StableIValue call(const std::string& name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  if (torch_call_dispatcher(("efficientad_fast::" + name).c_str(), overload, stack.data(), TORCH_ABI_VERSION) != 0) {
    throw Error("The operator " + name + " failed; what PyTorch says of it stands above.");
  }
  return stack[0];
}

Tensor new_tensor(const std::vector<int64_t>& shape, MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::empty(shape, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt, format);
}

Tensor tensor_of(const std::vector<int64_t>& shape, const std::vector<double>& values) {
  Tensor made = new_tensor(shape);
  std::copy(values.begin(), values.end(), static_cast<float*>(made.mutable_data_ptr()));
  return made;
}

// Of a convolution, in float64, in which they are folded.
struct Parameters {
  int64_t outputs = 0, inputs = 0, kernel = 0;
  std::vector<double> weight, bias;

  static Parameters read(SafeTensors& file, const std::string& name, int64_t outputs, int64_t inputs, int64_t kernel) {
    const std::vector<float> weight = file.numbers(name + ".weight", {outputs, inputs, kernel, kernel});
    const std::vector<float> bias = file.numbers(name + ".bias", {outputs});
    return {outputs, inputs, kernel, {weight.begin(), weight.end()}, {bias.begin(), bias.end()}};
  }

  Parameters part(int64_t first, int64_t count) const {
    const int64_t each = inputs * kernel * kernel;
    return {count, inputs, kernel, {weight.begin() + first * each, weight.begin() + (first + count) * each},
            {bias.begin() + first, bias.begin() + first + count}};
  }

  // With which the convolution's output is `(output - mean) / std`.
  Parameters normalised(const std::vector<float>& mean, const std::vector<float>& std) const {
    Parameters folded = *this;
    const int64_t each = inputs * kernel * kernel;
    for (int64_t output = 0; output < outputs; ++output) {
      const double divisor = std[output];
      // Divided by zero, all of a channel is infinite; infinite weights would make it NaN.
      const bool zero = divisor == 0;
      folded.bias[output] = zero ? std::numeric_limits<double>::infinity() : (bias[output] - mean[output]) / divisor;
      for (int64_t index = output * each; index < (output + 1) * each; ++index) {
        folded.weight[index] = zero ? 0 : weight[index] / divisor;
      }
    }
    return folded;
  }

  Tensor weights() const { return tensor_of({outputs, inputs, kernel, kernel}, weight); }

  Tensor biases() const { return tensor_of({outputs}, bias); }

  Tensor packed(const std::string& algorithm) const {
    return torch::stable::detail::to<Tensor>(call("conv_pool", "pack", weights(), int64_t{1}, algorithm));
  }
};

// What is fastest and exact enough, as efficientad_fast/ops/choices.json has it.
std::string algorithm_for(int64_t kernel, bool exact = false) {
  if (kernel != 3 && kernel != 4) {
    return "direct";
  }
  return kernel == 4 && exact ? "winograd4" : "winograd6";
}

std::array<double, 4> quantiles_of(const Json& stored) {
  const std::array<double, 4> found{stored.at("st_start").number(), stored.at("st_end").number(),
                                    stored.at("ae_start").number(), stored.at("ae_end").number()};
  const bool finite = std::all_of(found.begin(), found.end(), [](double one) { return std::isfinite(one); });
  if (!finite || found[0] == found[1] || found[2] == found[3]) {
    throw Error("its quantiles must be finite, and their ends other than their starts");
  }
  return found;
}

std::vector<double> three_numbers(const Json& stored, bool zero_admitted) {
  std::vector<double> found;
  for (const Json& one : stored.items()) {
    found.push_back(one.number());
    if (!std::isfinite(found.back()) || (found.back() == 0 && !zero_admitted)) {
      throw Error("its preprocessing has a mean or a std that cannot be");
    }
  }
  if (found.size() != 3) {
    throw Error("its preprocessing must have a mean and a std for each of three channels");
  }
  return found;
}

std::string one_of(const Json& stored, const std::string& what, const std::string& first, const std::string& second) {
  if (stored.text() != first && stored.text() != second) {
    throw Error("its " + what + " is " + stored.text() + ", and only " + first + " and " + second + " are supported");
  }
  return stored.text();
}

}  // namespace

struct Detector::Plan {
  explicit Plan(SafeTensors& file) {
    if (file.metadata("format") != kFormat) {
      throw Error("its format is \"" + file.metadata("format") + "\", expected \"" + kFormat + "\"");
    }
    const Json facts = Json::parse(file.metadata("detector"));
    const bool small = one_of(facts.at("model_size"), "model size", "s", "m") == "s";
    convention = one_of(facts.at("map_convention"), "map convention", "resized", "native");
    border = facts.at("pad_maps").boolean() ? kBorder : 0;
    threshold = facts.at("threshold").number();
    if (std::isnan(threshold)) {
      throw Error("its threshold is not a number");
    }
    if (!facts.at("quantiles").is_null()) {
      const std::array<double, 4> found = quantiles_of(facts.at("quantiles"));
      quantiles.emplace(found.begin(), found.end());
    }
    read_preprocessing(facts.at("preprocessing"));
    const int64_t channels = facts.at("out_channels").integer();
    if (channels < 1 || channels > kMostChannels) {
      throw Error("it has " + std::to_string(channels) + " output channels, expected 1 to 4096");
    }
    add_networks(file, small, facts.at("padding").boolean(), channels);
  }

  void read_preprocessing(const Json& stored) {
    const std::vector<Json>& size = stored.at("size").items();
    for (const Json& side : size) {
      if (side.integer() < kSmallestSide || side.integer() > kLargestSide) {
        throw Error("its networks see " + std::to_string(side.integer()) + " pixels, expected 256 to 4096 a side");
      }
    }
    if (size.size() != 2) {
      throw Error("its preprocessing must have a height and a width");
    }
    height = size[0].integer();
    width = size[1].integer();
    resize = one_of(stored.at("resize"), "resize", "antialias", "pillow");
    mean = three_numbers(stored.at("mean"), true);
    std = three_numbers(stored.at("std"), false);
  }

  void add_networks(SafeTensors& file, bool small, bool padded, int64_t channels) {
    image = new_tensor({1, 3, height, width}, MemoryFormat::ChannelsLast);
    // 2^21 numbers for a convolution, and the autoencoder's two largest activations: for each thread.
    const int64_t numbers = (int64_t{1} << 21) + 2 * 64 * (height / 2) * (width / 2);
    workspace = new_tensor({static_cast<int64_t>(torch::stable::get_num_threads()), numbers});

    const auto [teacher, teacher_last] = add_network(file, "teacher", small, padded, channels);
    const auto [student, student_last] = add_network(file, "student", small, padded, 2 * channels);
    const int64_t trimmed = padded ? 0 : 2 * kBorder;
    const std::array<int64_t, 2> features{(height + 3) / 4 - trimmed, (width + 3) / 4 - trimmed};
    const Tensor hidden = add_autoencoder(file, features);
    const Parameters deconv8 = Parameters::read(file, "autoencoder.decoder.deconv8", channels, 64, 3);

    map_st = new_tensor({1, 1, features[0], features[1]});
    map_ae = new_tensor({1, 1, features[0], features[1]});
    const Parameters normalised =
        teacher_last.normalised(file.numbers("teacher_mean", {channels}), file.numbers("teacher_std", {channels}));
    add_distance(teacher, normalised, 0, student, student_last.part(0, channels), map_st);
    add_distance(hidden, deconv8, 1, student, student_last.part(channels, channels), map_ae);
  }

  // A patch description network up to its last convolution: what that reads, and its parameters.
  std::pair<Tensor, Parameters> add_network(SafeTensors& file, const std::string& network, bool small, bool padded,
                                            int64_t channels) {
    struct Layer {
      int64_t outputs, kernel;
    };
    const std::vector<Layer> layers =
        small ? std::vector<Layer>{{128, 4}, {256, 4}, {256, 3}, {channels, 4}}
              : std::vector<Layer>{{256, 4}, {512, 4}, {512, 1}, {512, 3}, {channels, 4}, {channels, 1}};
    Tensor read = image;
    for (std::size_t index = 0;; ++index) {
      const Layer& layer = layers[index];
      const std::string name = network + ".conv" + std::to_string(index + 1);
      const Parameters parameters = Parameters::read(file, name, layer.outputs, read.size(1), layer.kernel);
      if (index + 1 == layers.size()) {
        return {read, parameters};
      }
      const bool pool = index < 2;
      read = add_convolution(read, parameters, padded ? (pool ? 3 : layer.kernel == 3) : 0, pool, pool && padded);
    }
  }

  Tensor add_convolution(const Tensor& read, const Parameters& parameters, int64_t padding, bool pool,
                         int64_t pool_padding) {
    const auto written = [&](int64_t side) {
      side += 2 * padding - parameters.kernel + 1;
      return pool ? (side + 2 * pool_padding) / 2 : side;
    };
    const Tensor out = new_tensor({1, parameters.outputs, written(read.size(2)), written(read.size(3))},
                                  MemoryFormat::ChannelsLast);
    // Pooling averages rounding errors.
    const Tensor packed = parameters.packed(algorithm_for(parameters.kernel, /*exact=*/!pool));
    const std::optional<Tensor> bias = parameters.biases();
    const int64_t kernel = parameters.kernel;
    steps.push_back([=, workspace = workspace] {
      call("conv_pool", "out", read, packed, bias, kernel, padding, /*relu=*/true, pool, pool_padding,
           /*groups=*/int64_t{1}, out, workspace);
    });
    return out;
  }

  // The autoencoder up to its last convolution: what that reads.
  Tensor add_autoencoder(SafeTensors& file, const std::array<int64_t, 2>& features) {
    std::vector<Tensor> packed, biases;
    const auto add = [&](const std::string& name, int64_t outputs, int64_t inputs, int64_t kernel, bool direct) {
      const Parameters parameters = Parameters::read(file, "autoencoder." + name, outputs, inputs, kernel);
      packed.push_back(parameters.packed(direct ? "direct" : algorithm_for(kernel)));
      biases.push_back(parameters.biases());
    };
    const std::array<int64_t, 7> encoded{3, 32, 32, 64, 64, 64, 64};
    for (int64_t layer = 1; layer <= 6; ++layer) {
      add("encoder.enconv" + std::to_string(layer), encoded[layer], encoded[layer - 1], layer == 6 ? 8 : 4, true);
    }
    for (int64_t layer = 1; layer <= 6; ++layer) {
      // For few pixels, weights cost more than products.
      const int64_t divisor = 128 >> layer, odd = layer % 2 == 1 || layer == 6;
      const bool few = (height / divisor - odd) * (width / divisor - odd) < 36;
      add("decoder.deconv" + std::to_string(layer), 64, 64, 4, few);
    }
    add("decoder.deconv7", 64, 64, 3, features[0] * features[1] < 36);
    const Tensor out = new_tensor({1, 64, features[0], features[1]}, MemoryFormat::ChannelsLast);
    steps.push_back([=, image = image, workspace = workspace] {
      call("autoencoder", "out", image, packed, biases, out, workspace);
    });
    return out;
  }

  // The mean square of the difference of two convolutions.
  void add_distance(const Tensor& first, const Parameters& of_first, int64_t padding, const Tensor& second,
                    const Parameters& of_second, const Tensor& out) {
    // A 1x1 kernel gains nothing from being filtered as a larger one.
    const bool direct = of_first.kernel == 1 || of_second.kernel == 1;
    const std::string algorithm = direct ? "direct" : algorithm_for(std::max(of_first.kernel, of_second.kernel));
    const Tensor packed = torch::stable::detail::to<Tensor>(
        call("feature_distance", "pack", of_first.weights(), std::optional(of_second.weights()), algorithm));
    std::vector<double> difference(of_first.bias);
    for (std::size_t index = 0; index < difference.size(); ++index) {
      difference[index] -= of_second.bias[index];
    }
    const std::optional<Tensor> bias = tensor_of({of_first.outputs}, difference), other = second;
    const int64_t channels = of_first.outputs, kernel_first = of_first.kernel, kernel_second = of_second.kernel;
    steps.push_back([=, workspace = workspace] {
      call("feature_distance", "out", first, other, packed, bias, channels, kernel_first, kernel_second, padding,
           /*padding_second=*/int64_t{0}, out, workspace);
    });
  }

  // The anomaly map at that size, and its largest value.
  float anomaly_map(int64_t map_height, int64_t map_width, std::vector<float>& values) const {
    const Tensor map = new_tensor({1, 1, map_height, map_width}), score = new_tensor({1});
    call("anomaly_map", "out", map_st, map_ae, quantiles, border, convention, map, score);
    const float* const numbers = static_cast<const float*>(map.const_data_ptr());
    values.assign(numbers, numbers + map_height * map_width);
    return *static_cast<const float*>(score.const_data_ptr());
  }

  static constexpr const char* kFormat = "efficientad_fast detector 1";

  int64_t height = 0, width = 0, border = 0;
  std::string resize, convention;
  std::vector<double> mean, std;
  std::optional<std::vector<double>> quantiles;
  double threshold = 0;
  Tensor image, workspace, map_st, map_ae;
  std::vector<std::function<void()>> steps;
};

Detector::Detector(std::unique_ptr<Plan> plan) : plan_(std::move(plan)) {}
Detector::Detector(Detector&&) noexcept = default;
Detector& Detector::operator=(Detector&&) noexcept = default;
Detector::~Detector() = default;

Detector Detector::load(const std::string& path) {
  try {
    SafeTensors file(path);
    return Detector(std::make_unique<Plan>(file));
  } catch (const Error& error) {
    throw Error(path + " is no detector that can be loaded: " + error.what() + ".");
  }
}

double Detector::threshold() const {
  return plan_->threshold;
}

Prediction Detector::predict(const Image& image) {
  const bool fitting = image.height >= 1 && image.width >= 1 &&
                       image.pixels.size() / 3 / static_cast<uint64_t>(image.width) ==
                           static_cast<uint64_t>(image.height) &&
                       image.pixels.size() == static_cast<uint64_t>(image.height * image.width) * 3;
  if (!fitting) {
    throw Error("An image must have height * width * 3 bytes, and at least one pixel.");
  }
  Plan& plan = *plan_;
  const std::vector<int64_t> shape{1, image.height, image.width, 3};
  const std::vector<int64_t> strides{image.height * image.width * 3, image.width * 3, 3, 1};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  // Not written to.
  const Tensor pixels =
      torch::stable::from_blob(const_cast<uint8_t*>(image.pixels.data()), shape, strides, cpu, ScalarType::Byte);
  call("preprocess", "out", pixels, plan.resize, plan.mean, plan.std, plan.image);
  for (const std::function<void()>& step : plan.steps) {
    step();
  }
  Prediction prediction;
  prediction.height = plan.height;
  prediction.width = plan.width;
  prediction.score = plan.anomaly_map(plan.height, plan.width, prediction.anomaly_map);
  if (plan.convention == "native") {  // whose score is taken at the size of the image
    std::vector<float> map;
    prediction.score = plan.anomaly_map(image.height, image.width, map);
  }
  if (std::isnan(prediction.score)) {
    throw Error("The networks made NaN of the image, so it has no score: the detector's weights or statistics are "
                "damaged; copy or train it again.");
  }
  prediction.anomalous = prediction.score > plan.threshold;
  return prediction;
}

}  // namespace efficientad
