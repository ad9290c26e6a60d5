// The catalogue's kernels in the emulator, over memory of the host; tests/emulated.py calls these.

#include "cuda/anomaly_map_kernel.h"
#include "cuda/autoencoder_kernel.h"
#include "cuda/conv_pool_kernel.h"
#include "cuda/feature_distance_kernel.h"
#include "cuda/hard_feature_loss_kernel.h"
#include "cuda/implicit_gemm_call.h"
#include "cuda/preprocess_kernel.h"
#include "cuda/quantile_kernel.h"
#include "simt/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace efficientad_fast::simt {

namespace {

using cuda::Dtype;

// A tensor of the host, as Python describes it.
struct Array {
  std::uintptr_t pointer;
  std::string dtype;
  std::vector<std::int64_t> sizes, strides;

  Dtype device_dtype() const {
    static const std::pair<const char*, Dtype> known[] = {{"float32", Dtype::kFloat32}, {"float64", Dtype::kFloat64},
                                                          {"float16", Dtype::kFloat16}, {"bfloat16", Dtype::kBFloat16},
                                                          {"uint8", Dtype::kUint8}};
    for (const auto& [name, value] : known) {
      if (dtype == name) {
        return value;
      }
    }
    throw std::invalid_argument("no kernel takes " + dtype);
  }

  bool is_e4m3() const { return dtype == "float8_e4m3fn"; }

  cuda::Number number() const {
    return is_e4m3()                ? cuda::Number::kE4m3
           : dtype == "float16"     ? cuda::Number::kFloat16
           : dtype == "bfloat16"    ? cuda::Number::kBFloat16
                                    : cuda::Number::kFloat32;
  }

  std::size_t element_size() const {
    if (is_e4m3()) {
      return 1;
    }
    switch (device_dtype()) {
      case Dtype::kFloat64: return 8;
      case Dtype::kFloat32: return 4;
      case Dtype::kUint8: return 1;
      default: return 2;
    }
  }

  // From the first to the last element, with what lies between them.
  std::size_t bytes() const {
    std::size_t last = 0;
    for (std::size_t axis = 0; axis < sizes.size(); ++axis) {
      if (sizes[axis] == 0) {
        return 0;
      }
      last += static_cast<std::size_t>((sizes[axis] - 1) * strides[axis]);
    }
    return (last + 1) * element_size();
  }

  // Of these, how many lie between elements.
  std::size_t bytes_between() const {
    std::size_t count = 1;
    for (const std::int64_t size : sizes) {
      count *= static_cast<std::size_t>(size);
    }
    return bytes() - count * element_size();
  }
};

Buffer source(const char* name, const Array& array) {
  return Buffer(name, reinterpret_cast<void*>(array.pointer), array.bytes(), /*writable=*/false, /*initialised=*/true);
}

Buffer result(const char* name, const Array& array) {
  return Buffer(name, reinterpret_cast<void*>(array.pointer), array.bytes(), /*writable=*/true, /*initialised=*/false);
}

// To the host, once every element was written, and nothing `between` them.
void take(const Buffer& buffer, std::size_t between = 0) {
  if (const std::size_t left = buffer.unwritten(); left != between) {
    throw KernelError("the launch left " + std::to_string(left) + " of " + std::to_string(buffer.bytes()) +
                      " bytes of " + buffer.name() + " unwritten");
  }
  buffer.download();
}

// coefficients: those of csrc/anomaly_map.h, st, ae, inside and outside.
void anomaly_map(const Array& map_st, const Array& map_ae, const std::array<double, 4>& coefficients, int border,
                 const Array& out, const Array& score) {
  const Buffer st = source("map_st", map_st), ae = source("map_ae", map_ae);
  const Buffer map = result("anomaly_map", out), scores = result("score", score);
  const auto raw_map = [](const Array& array, const Buffer& buffer) {
    return cuda::RawMap{buffer.as<void>(), array.device_dtype(), array.strides[0], array.strides[2], array.strides[3]};
  };
  cuda::AnomalyMap call{};
  call.st = raw_map(map_st, st), call.ae = raw_map(map_ae, ae);
  call.images = map_st.sizes[0];
  call.height = static_cast<int>(map_st.sizes[2]), call.width = static_cast<int>(map_st.sizes[3]);
  call.border = border;
  call.out_height = static_cast<int>(out.sizes[2]), call.out_width = static_cast<int>(out.sizes[3]);
  call.a = coefficients[0], call.b = coefficients[1], call.inside = coefficients[2], call.outside = coefficients[3];
  call.out = map.as<void>(), call.score = scores.as<void>();
  cuda::launch_anomaly_map(call, nullptr);
  take(map), take(scores);
}

// maps and results: of map_st and map_ae; `combined` comes last among the results.
void drop_in(const std::array<Array, 2>& maps, const std::array<std::optional<Array>, 2>& quantiles,
             const std::array<Array, 3>& results) {
  const Buffer st = source("map_st", maps[0]), ae = source("map_ae", maps[1]);
  const Buffer st_result = result("map_st result", results[0]), ae_result = result("map_ae result", results[1]);
  const Buffer combined = result("map_combined", results[2]);
  std::optional<Buffer> st_quantiles, ae_quantiles;
  cuda::DropIn call{};
  call.st = st.as<void>(), call.st_dtype = maps[0].device_dtype();
  call.ae = ae.as<void>(), call.ae_dtype = maps[1].device_dtype();
  call.st_result = st_result.as<void>(), call.ae_result = ae_result.as<void>();
  call.combined = combined.as<void>(), call.combined_dtype = results[2].device_dtype();
  const auto pass = [](const char* name, const Array& array, std::optional<Buffer>& buffer, const void*& pointer,
                       Dtype& dtype, std::int64_t& stride) {
    buffer.emplace(name, reinterpret_cast<void*>(array.pointer), array.bytes(), false, true);
    pointer = buffer->as<void>(), dtype = array.device_dtype(), stride = array.strides[0];
  };
  if (quantiles[0]) {
    pass("st_quantiles", *quantiles[0], st_quantiles, call.st_quantiles, call.st_quantile_dtype,
         call.st_quantile_stride);
  }
  if (quantiles[1]) {
    pass("ae_quantiles", *quantiles[1], ae_quantiles, call.ae_quantiles, call.ae_quantile_dtype,
         call.ae_quantile_stride);
  }
  call.count = 1;
  for (const std::int64_t size : maps[0].sizes) {
    call.count *= size;
  }
  cuda::launch_drop_in(call, nullptr);
  take(st_result), take(ae_result), take(combined);
}

void preprocess(const Array& image, bool pillow, const std::array<double, 3>& mean, const std::array<double, 3>& std,
                int pixel_stride, const Array& out) {
  const Buffer from = source("image", image), to = result("out", out);
  cuda::Preprocess call{};
  call.image = from.as<void>(), call.image_dtype = image.device_dtype();
  call.image_stride = image.strides[0], call.row_stride = image.strides[1];
  call.column_stride = image.strides[2], call.channel_stride = image.strides[3];
  call.images = image.sizes[0];
  call.rows = cuda::Axis(static_cast<int>(image.sizes[1]), static_cast<int>(out.sizes[2]));
  call.columns = cuda::Axis(static_cast<int>(image.sizes[2]), static_cast<int>(out.sizes[3]));
  call.pillow = pillow;
  call.set_statistics(mean, std);
  call.out = to.as<void>(), call.out_dtype = out.device_dtype();
  call.pixel_stride = pixel_stride;
  cuda::launch_preprocess(call, nullptr);
  take(to, out.bytes_between());
}

// Of int64, contiguous: what a kernel reads and writes.
Buffer whole_numbers(const char* name, const Array& array, bool initialised) {
  std::size_t bytes = sizeof(std::int64_t);
  for (const std::int64_t size : array.sizes) {
    bytes *= static_cast<std::size_t>(size);
  }
  return Buffer(name, reinterpret_cast<void*>(array.pointer), bytes, /*writable=*/true, initialised);
}

// values: contiguous, as for quantile_count.
void quantile(const Array& values, const std::vector<double>& fractions, const Array& out, const Array& workspace) {
  const Buffer from = source("values", values), to = result("out", out);
  const Buffer selection = whole_numbers("workspace", workspace, /*initialised=*/false);
  cuda::Quantile call{};
  call.values = from.as<float>(), call.count = static_cast<std::int64_t>(values.bytes() / sizeof(float));
  call.out = to.as<float>(), call.selection = selection.as<cuda::QuantileSelection>();
  cuda::launch_quantile(call, fractions.data(), static_cast<std::int64_t>(fractions.size()), nullptr);
  take(to);
}

void quantile_count(const Array& values, const std::vector<std::int64_t>& prefixes, const Array& counts) {
  const Buffer from = source("values", values), to = whole_numbers("counts", counts, /*initialised=*/true);
  cuda::QuantileCount call{};
  call.values = from.as<float>(), call.count = static_cast<std::int64_t>(values.bytes() / sizeof(float));
  call.counts = to.as<unsigned long long>();
  cuda::launch_quantile_count(call, prefixes.data(), static_cast<std::int64_t>(prefixes.size()), nullptr);
  take(to);
}

// image: channels next to each other; weights channels-last, biases contiguous.
void autoencoder(const Array& image, const std::vector<Array>& weights, const std::vector<Array>& biases,
                 const Array& out, const Array& workspace) {
  const Buffer from = source("image", image), to = result("out", out), room = result("workspace", workspace);
  std::vector<std::unique_ptr<Buffer>> parameters;
  const auto pass = [&parameters](const char* name, std::size_t index, const Array& array) {
    parameters.push_back(std::make_unique<Buffer>(name + ("[" + std::to_string(index) + "]"),
                                                  reinterpret_cast<void*>(array.pointer), array.bytes(), false, true));
    return parameters.back()->as<void>();
  };
  cuda::Autoencoder call{};
  call.image = from.as<void>();
  call.image_stride = image.strides[0], call.row_stride = image.strides[2], call.pixel_stride = image.strides[3];
  call.images = image.sizes[0], call.height = image.sizes[2], call.width = image.sizes[3];
  call.channels = image.sizes[1];
  for (std::size_t index = 0; index < weights.size(); ++index) {
    call.weights[index] = pass("weights", index, weights[index]);
    call.biases[index] = static_cast<const float*>(pass("biases", index, biases[index]));
    call.outputs[index] = weights[index].sizes[0];
  }
  call.dtype = image.device_dtype();
  call.workspace = room.as<void>();
  call.out = to.as<void>(), call.out_height = out.sizes[2], call.out_width = out.sizes[3];
  call.narrow = out.is_e4m3();
  cuda::launch_autoencoder(call, nullptr);
  take(to);
}

// Whether both have rows in common, in the order of their axes: what is not is copied before.
bool find_rows(const Array& teacher, const Array& student, cuda::FeaturePair* features) {
  std::int64_t sizes[cuda::kFeatureAxes], teacher_strides[cuda::kFeatureAxes], student_strides[cuda::kFeatureAxes];
  std::copy_n(teacher.sizes.begin(), cuda::kFeatureAxes, sizes);
  std::copy_n(teacher.strides.begin(), cuda::kFeatureAxes, teacher_strides);
  std::copy_n(student.strides.begin(), cuda::kFeatureAxes, student_strides);
  return cuda::find_common_rows(sizes, teacher_strides, student_strides, features);
}

bool have_rows(const Array& teacher, const Array& student) {
  cuda::FeaturePair features{};
  return find_rows(teacher, student, &features);
}

// `teacher` and `student` have rows in common.
cuda::FeaturePair features_of(const Array& teacher, const Buffer& from_teacher, const Array& student,
                           const Buffer& from_student) {
  cuda::FeaturePair features{};
  find_rows(teacher, student, &features);
  features.teacher = from_teacher.as<void>(), features.teacher_dtype = teacher.device_dtype();
  features.student = from_student.as<void>(), features.student_dtype = student.device_dtype();
  return features;
}

void hard_feature_loss(const Array& teacher, const Array& student, double fraction, const Array& loss,
                       const Array& threshold, const Array& count, const Array& workspace) {
  const Buffer from_teacher = source("teacher", teacher), from_student = source("student", student);
  const Buffer to_loss = result("loss", loss), to_threshold = result("threshold", threshold);
  const Buffer to_count = whole_numbers("count", count, /*initialised=*/false);
  const Buffer room = whole_numbers("workspace", workspace, /*initialised=*/false);
  cuda::HardFeatureLoss call{};
  call.features = features_of(teacher, from_teacher, student, from_student);
  call.fraction = fraction;
  call.loss = to_loss.as<float>(), call.threshold = to_threshold.as<float>();
  call.count = to_count.as<std::int64_t>(), call.workspace = room.as<cuda::LossWorkspace>();
  cuda::launch_hard_feature_loss(call, nullptr);
  take(to_loss), take(to_threshold), take(to_count);
}

void loss_gradient(const Array& teacher, const Array& student, const Array& threshold, const Array& count,
                   const Array& grad_loss, const Array& gradient) {
  const Buffer from_teacher = source("teacher", teacher), from_student = source("student", student);
  const Buffer from_threshold = source("threshold", threshold), from_grad = source("grad_loss", grad_loss);
  const Buffer from_count = whole_numbers("count", count, /*initialised=*/true);
  const Buffer to = result("gradient", gradient);
  cuda::LossGradient call{};
  call.features = features_of(teacher, from_teacher, student, from_student);
  call.threshold = from_threshold.as<float>(), call.grad_loss = from_grad.as<float>();
  call.count = from_count.as<std::int64_t>(), call.gradient = to.as<void>();
  cuda::launch_loss_gradient(call, nullptr);
  take(to);
}

// Numbers that are read where they are given.
class OptionalSource {
 public:
  OptionalSource(const char* name, const std::optional<Array>& array) {
    if (array) {
      buffer_.emplace(name, reinterpret_cast<void*>(array->pointer), array->bytes(), /*writable=*/false,
                      /*initialised=*/true);
    }
  }

  const float* data() const { return buffer_ ? buffer_->as<float>() : nullptr; }

 private:
  std::optional<Buffer> buffer_;
};

// images: with channels next to each other; weight: channels-last.
cuda::Convolution convolution_of(const Array& images, const Buffer& from, const Array& weight, const Buffer& weights,
                                 int padding) {
  return cuda::convolution_of(from.as<void>(), images.sizes, images.strides, weights.as<void>(), weight.sizes, padding);
}

// As convolution_of wants images and weight; with fewer multiprocessors tiles are larger, with less shared
// memory, in bytes, the pieces of large ones are shorter.
void conv_pool(const Array& images, const Array& weight, const std::optional<Array>& scale,
               const std::optional<Array>& bias, int padding, bool relu, bool pool, int pool_padding, int groups,
               const Array& out, int multiprocessors, int shared_of_block) {
  const Buffer from = source("input", images), weights = source("weight", weight), to = result("out", out);
  const OptionalSource scales("scale", scale), biases("bias", bias);
  cuda::ConvPool call{};
  call.convolution = convolution_of(images, from, weight, weights, padding);
  call.made = cuda::made_of(call.convolution, out.sizes, pool, pool_padding);
  call.groups = groups, call.group_outputs = static_cast<int>(weight.sizes[0]) / groups;
  call.scale = scales.data(), call.bias = biases.data();
  call.relu = relu;
  call.out = to.as<void>();
  call.number = images.number(), call.out_number = out.number();
  call.multiprocessors = multiprocessors, call.shared_of_block = shared_of_block;
  cuda::launch_conv_pool(call, nullptr);
  take(to);
}

// images and weights: one or two, as for conv_pool. The workspace stays as kernels leave it.
void feature_distance(const std::vector<Array>& images, const std::vector<Array>& weights,
                      const std::optional<Array>& scale, const std::optional<Array>& bias,
                      const std::array<int, 2>& paddings, const Array& out, const Array& workspace,
                      int multiprocessors, int shared_of_block) {
  const bool paired = images.size() == 2;
  const Buffer first = source("first", images[0]), weight_first = source("weight_first", weights[0]);
  const Buffer second = source("second", images.back()), weight_second = source("weight_second", weights.back());
  const Buffer to = result("out", out);
  const Buffer room("workspace", reinterpret_cast<void*>(workspace.pointer), workspace.bytes(), /*writable=*/true,
                    /*initialised=*/true);
  const OptionalSource scales("scale", scale), biases("bias", bias);
  cuda::FeatureDistance call{};
  call.first = convolution_of(images[0], first, weights[0], weight_first, paddings[0]);
  call.second = convolution_of(images.back(), second, weights.back(), weight_second, paddings[paired ? 1 : 0]);
  call.paired = paired;
  call.made = cuda::made_of(call.first, out.sizes, /*pool=*/false, /*pool_padding=*/0);
  call.outputs = static_cast<int>(weights[0].sizes[0]);
  call.scale = scales.data(), call.bias = biases.data();
  call.out = to.as<float>();
  call.workspace = room.as<float>(), call.workspace_size = workspace.sizes[0];
  call.number = images[0].number();
  call.multiprocessors = multiprocessors, call.shared_of_block = shared_of_block;
  cuda::launch_feature_distance(call, nullptr);
  take(to);
  room.download();
}

}  // namespace

}  // namespace efficientad_fast::simt

EFFICIENTAD_FAST_SIMT_BINDINGS(m) {
  using namespace efficientad_fast;
  py::class_<simt::Array>(m, "Array", py::module_local(), "A CPU tensor.")
      .def(py::init([](std::uintptr_t pointer, std::string dtype, std::vector<std::int64_t> sizes,
                       std::vector<std::int64_t> strides) {
             return simt::Array{pointer, std::move(dtype), std::move(sizes), std::move(strides)};
           }),
           py::arg("pointer"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"));
  m.def("anomaly_map", &simt::anomaly_map);
  m.def("autoencoder", &simt::autoencoder);
  m.def("drop_in", &simt::drop_in);
  m.def("hard_feature_loss", &simt::hard_feature_loss);
  m.def("have_rows", &simt::have_rows);
  m.def("loss_gradient", &simt::loss_gradient);
  m.def("preprocess", &simt::preprocess);
  m.def("conv_pool", &simt::conv_pool);
  m.def("feature_distance", &simt::feature_distance);
  m.def("quantile", &simt::quantile);
  m.def("quantile_count", &simt::quantile_count);
}
