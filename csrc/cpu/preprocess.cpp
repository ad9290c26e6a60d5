// preprocess on the CPU. Both resizes are separable; each output row is made whole and leaves the cache once.
//
// antialias: vertical pass first, which streams over rows as they lie; then the horizontal one over 1 row in place of
// many. pillow: horizontal pass first and rounded, as Pillow does it, for 16 rows at once, so that vectors run over rows;
// they are kept while output rows share them.

#include "preprocess.h"

#include "level.h"
#include "numbers.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

namespace efficientad_fast {

namespace {

using preprocess::Settings;

// Rows whose 8-bit levels are blended together: the bytes of a vector that every processor has.
constexpr int kTogether = 16;

constexpr int64_t whole_vectors(int64_t bytes) {
  return (bytes + kTogether - 1) / kTogether * kTogether;
}

#define EFFICIENTAD_FAST_KERNEL "preprocess_kernel.h"
#include "for_each_level.h"

// Output rows per thread below which starting one costs more than it saves.
constexpr int64_t kGrainRows = 8;

// Which inputs each output of a bilinear (triangle) filter reads, and their weights, which sum to 1 or to 2^22.
template <typename Weight>
struct Taps {
  int64_t most = 0;            // weights of output i start at i * most
  std::vector<int64_t> first;  // of the inputs
  std::vector<int32_t> count;
  std::vector<Weight> weight;

  Taps(int64_t length, int64_t target) : first(target), count(target) {
    const double scale = static_cast<double>(length) / static_cast<double>(target);
    const double stretch = std::max(scale, 1.0);
    most = 2 * static_cast<int64_t>(std::ceil(stretch)) + 1;
    weight.resize(target * most);
    std::vector<double> raw(most);
    for (int64_t i = 0; i < target; ++i) {
      if (length == target) {  // a copy: the neighbour with weight zero is not read, for it may be NaN
        first[i] = i, count[i] = 1, weight[i * most] = std::is_integral_v<Weight> ? Weight{1 << 22} : Weight{1};
        continue;
      }
      const double centre = (static_cast<double>(i) + 0.5) * scale;
      first[i] = std::max<int64_t>(static_cast<int64_t>(centre - stretch + 0.5), 0);
      const int64_t end = std::min<int64_t>(static_cast<int64_t>(centre + stretch + 0.5), length);
      count[i] = static_cast<int32_t>(end - first[i]);
      double total = 0;
      for (int32_t tap = 0; tap < count[i]; ++tap) {
        const double distance = (static_cast<double>(first[i] + tap) - centre + 0.5) * (1.0 / stretch);
        raw[tap] = std::max(1.0 - std::fabs(distance), 0.0);
        total += raw[tap];
      }
      for (int32_t tap = 0; tap < count[i]; ++tap) {
        const double share = raw[tap] / total;
        if constexpr (std::is_integral_v<Weight>) {
          weight[i * most + tap] = static_cast<Weight>(share * (1 << 22) + 0.5);
        } else {
          weight[i * most + tap] = static_cast<Weight>(share);
        }
      }
    }
  }
};

// (x / unit - mean) / std as one multiplication and addition. The fourth number is a vector's, which is not used.
struct Folded {
  float scale[4] = {}, shift[4] = {};

  Folded(const Settings& settings, double unit) {
    for (int channel = 0; channel < 3; ++channel) {
      scale[channel] = static_cast<float>(1.0 / (unit * settings.std[channel]));
      shift[channel] = static_cast<float>(-settings.mean[channel] / settings.std[channel]);
    }
  }
};

// Where results go, whatever their dtype and layout.
struct Output {
  void* data;
  ScalarType dtype;
  int64_t height, width;
  int64_t pixel_stride;  // as preprocess::pixel_stride has it

  // `row`: 3 * width floats, HWC. `plane`: room for `width` floats.
  void store_row(const float* row, int64_t image, int64_t y, float* plane) const {
    if (pixel_stride == 3) {
      store_as(row, data, dtype, (image * height + y) * width * 3, 3 * width);
      return;
    }
    if (pixel_stride > 0) {
      for (int64_t x = 0; x < width; ++x) {
        store_as(row + 3 * x, data, dtype, ((image * height + y) * width + x) * pixel_stride, 3);
      }
      return;
    }
    for (int64_t channel = 0; channel < 3; ++channel) {
      for (int64_t x = 0; x < width; ++x) {
        plane[x] = row[3 * x + channel];
      }
      store_plane(plane, image, channel, y);
    }
  }

  // `plane`: width floats of one channel of a row. For results that are not channels-last.
  void store_plane(const float* plane, int64_t image, int64_t channel, int64_t y) const {
    store_as(plane, data, dtype, ((image * 3 + channel) * height + y) * width, width);
  }
};

template <typename Source>
void resize_antialias(const Source* source, int64_t images, int64_t height, int64_t width, const Settings& settings,
                      const Output& out) {
  const Taps<float> rows(height, out.height), columns(width, out.width);
  const Folded folded(settings, std::is_same_v<Source, uint8_t> ? 255 : 1);
  torch::stable::parallel_for(0, images * out.height, kGrainRows, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(3 * width + 1 + 3 * out.width + 1 + out.width);
    float* const blended = buffer.data();
    float* const result = blended + 3 * width + 1;
    float* const plane = result + 3 * out.width + 1;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / out.height, y = index % out.height;
      const Source* const top = source + (image * height + rows.first[y]) * width * 3;
      EFFICIENTAD_FAST_DISPATCH(blend_rows, top, rows.weight.data() + y * rows.most, rows.count[y], 3 * width, blended);
      EFFICIENTAD_FAST_DISPATCH(blend_pixels, blended, columns.first.data(), columns.count.data(), columns.weight.data(),
                                columns.most, out.width, folded.scale, folded.shift, result);
      out.store_row(result, image, y, plane);
    }
  });
}

uint8_t to_level(float value) {
  const double level = std::nearbyint(static_cast<double>(value) * 255.0);
  return static_cast<uint8_t>(level > 0 ? std::min(level, 255.0) : 0.0);  // 0 for NaN, which no level stands for
}

template <typename Source>
void resize_pillow(const Source* source, int64_t images, int64_t height, int64_t width, const Settings& settings,
                   const Output& out) {
  const Taps<int32_t> rows(height, out.height), columns(width, out.width);
  const Folded folded(settings, 255);
  torch::stable::parallel_for(0, images * out.height, kGrainRows, [&](int64_t begin, int64_t end) {
    const int64_t out_count = 3 * out.width, out_stride = whole_vectors(out_count);
    // Rows at the new width, a group of neighbours at a time; enough groups for the taps of an output row.
    const int64_t groups = height == out.height ? 1 : (rows.most + kTogether - 1) / kTogether + 1;
    std::vector<uint8_t> ring(groups * kTogether * out_stride), levels, turned, narrow, blended(out_count);
    if constexpr (!std::is_same_v<Source, uint8_t>) {
      levels.resize(kTogether * 3 * width);
    }
    if (width != out.width) {
      turned.resize(kTogether * 3 * width);
      narrow.resize(kTogether * out_stride);
    }
    const int64_t groups_of_image = (height + kTogether - 1) / kTogether;
    std::vector<int64_t> held(groups, -1);
    std::vector<const uint8_t*> needed(rows.most);
    std::vector<float> result(out_count), plane(out.width);

    // Row y of an image at the new width, from the ring or made now with its neighbours.
    const auto narrowed = [&](int64_t image, int64_t y) -> const uint8_t* {
      const int64_t number = image * groups_of_image + y / kTogether, slot = number % groups;
      uint8_t* const group = ring.data() + slot * kTogether * out_stride;
      const uint8_t* const row = group + y % kTogether * out_stride;
      if (held[slot] == number) {
        return row;
      }
      held[slot] = number;
      const uint8_t* bytes[kTogether];
      for (int64_t i = 0; i < kTogether; ++i) {
        const int64_t one = std::min(y / kTogether * kTogether + i, height - 1);  // the last stands for those after it
        const Source* const from = source + (image * height + one) * width * 3;
        if constexpr (std::is_same_v<Source, uint8_t>) {
          bytes[i] = from;
        } else {
          std::transform(from, from + 3 * width, levels.begin() + i * 3 * width, to_level);
          bytes[i] = levels.data() + i * 3 * width;
        }
      }
      if (width == out.width) {
        for (int64_t i = 0; i < kTogether; ++i) {
          for (int64_t channel = 0; channel < 3; ++channel) {
            for (int64_t x = 0; x < width; ++x) {
              group[i * out_stride + channel * width + x] = bytes[i][3 * x + channel];
            }
          }
        }
      } else {
        EFFICIENTAD_FAST_DISPATCH(blend_byte_pixels, bytes, width, columns.first.data(), columns.count.data(),
                                  columns.weight.data(), columns.most, out.width, turned.data(), narrow.data(), group,
                                  out_stride);
      }
      return row;
    };

    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / out.height, y = index % out.height;
      const uint8_t* row;
      if (height == out.height) {
        row = narrowed(image, y);
      } else {
        for (int32_t tap = 0; tap < rows.count[y]; ++tap) {
          needed[tap] = narrowed(image, rows.first[y] + tap);
        }
        EFFICIENTAD_FAST_DISPATCH(blend_bytes, needed.data(), rows.weight.data() + y * rows.most, rows.count[y],
                                  out_count, blended.data());
        row = blended.data();
      }
      for (int64_t channel = 0; channel < 3; ++channel) {
        EFFICIENTAD_FAST_DISPATCH(scale_levels, row + channel * out.width, out.width, folded.scale[channel],
                                  folded.shift[channel], plane.data());
        if (out.pixel_stride == 0) {
          out.store_plane(plane.data(), image, channel, y);
          continue;
        }
        for (int64_t x = 0; x < out.width; ++x) {
          result[3 * x + channel] = plane[x];
        }
      }
      if (out.pixel_stride > 0) {
        out.store_row(result.data(), image, y, plane.data());
      }
    }
  });
}

template <typename Source>
void compute(const Tensor& image, const Settings& settings, const Output& out) {
  const Tensor dense = torch::stable::contiguous(image);
  const auto resize = settings.pillow ? resize_pillow<Source> : resize_antialias<Source>;
  resize(static_cast<const Source*>(dense.const_data_ptr()), image.size(0), image.size(1), image.size(2), settings, out);
}

void preprocess_into(const Tensor& image, const Settings& settings, Tensor& out) {
  const Output output{out.mutable_data_ptr(), out.scalar_type(), out.size(2), out.size(3),
                      preprocess::pixel_stride(out)};
  if (image.scalar_type() == ScalarType::Byte) {
    compute<uint8_t>(image, settings, output);
  } else {
    compute<float>(image, settings, output);
  }
}

void preprocess_out(const Tensor& image, std::string resize, std::vector<double> mean, std::vector<double> std,
                    Tensor out) {
  const Settings settings = preprocess::checked_settings(image, resize, mean, std, /*cuda=*/false);
  preprocess::check_output(image, out);
  preprocess_into(image, settings, out);
}

Tensor preprocess_default(const Tensor& image, std::vector<int64_t> size, std::string resize, std::vector<double> mean,
                          std::vector<double> std, bool channels_last, ScalarType dtype) {
  const Settings settings = preprocess::checked_settings(image, resize, mean, std, /*cuda=*/false);
  require_positive_size("preprocess", size);
  preprocess::check_dtype("dtype", dtype);
  Tensor out = preprocess::empty_output(image, size, channels_last, dtype);
  preprocess_into(image, settings, out);
  return out;
}

}  // namespace

}  // namespace efficientad_fast

#define EFFICIENTAD_FAST_REGISTER(library)                                        \
  STABLE_TORCH_LIBRARY_IMPL(library, CPU, m) {                                    \
    m.impl("preprocess", TORCH_BOX(&efficientad_fast::preprocess_default));       \
    m.impl("preprocess.out", TORCH_BOX(&efficientad_fast::preprocess_out));       \
  }
EFFICIENTAD_FAST_REGISTER(efficientad_fast)
EFFICIENTAD_FAST_REGISTER(efficientad_fast_cpu)
