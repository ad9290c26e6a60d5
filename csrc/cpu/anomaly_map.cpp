// anomaly_map on the CPU. Every output row is a blend of two expanded feature rows, so that the gathers of the
// horizontal interpolation run once per feature row (a quarter of the output rows) and the rest streams.

#include "anomaly_map.h"

#include "level.h"
#include "numbers.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace efficientad_fast {

namespace {

#define EFFICIENTAD_FAST_KERNEL "anomaly_map_kernel.h"
#include "for_each_level.h"

using torch::stable::parallel_for;

// Output elements per thread below which starting one costs more than it saves.
constexpr int64_t kGrain = 16 * 1024;

// Where output i of a bilinear resize reads (align_corners=False): between `left` and `right`, `weight` of the latter.
template <typename T>
struct Interpolation {
  std::vector<int32_t> left, right;
  std::vector<T> weight;
  bool is_copy;  // then no neighbour is read: an inf in it, times zero, would be a NaN here

  Interpolation(int64_t length, int64_t target)
      : left(target), right(target), weight(target), is_copy(length == target) {
    const T scale = static_cast<T>(length) / static_cast<T>(target);
    for (int64_t i = 0; i < target; ++i) {
      const T position = std::max<T>((static_cast<T>(i) + T(0.5)) * scale - T(0.5), 0);
      left[i] = static_cast<int32_t>(std::min<int64_t>(static_cast<int64_t>(position), length - 1));
      right[i] = left[i] + (left[i] < length - 1);
      weight[i] = std::min<T>(position - static_cast<T>(left[i]), 1);
    }
  }
};

template <typename T>
void compute(const Tensor& map_st, const Tensor& map_ae, const anomaly_map::Coefficients& folded, int64_t border,
             Tensor& out, Tensor& score) {
  const int64_t images = map_st.size(0), height = map_st.size(2), width = map_st.size(3);
  const int64_t out_height = out.size(2), out_width = out.size(3);
  if (images == 0) {
    return;
  }
  const Tensor st = torch::stable::contiguous(map_st), ae = torch::stable::contiguous(map_ae);
  const Interpolation<T> rows(height + 2 * border, out_height), columns(width + 2 * border, out_width);
  std::vector<T> row_maxima(images * out_height);
  T* const map = static_cast<T*>(out.mutable_data_ptr());

  parallel_for(0, images * out_height, std::max<int64_t>(kGrain / out_width, 1), [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(2 * width + (width + 2 * border) + 3 * out_width);
    T* const st_row = buffer.data();
    T* const ae_row = st_row + width;
    T* const padded = ae_row + width;
    T* expanded[2] = {padded + width + 2 * border, padded + width + 2 * border + out_width};
    const T* const zeros = expanded[1] + out_width;
    int64_t held[2] = {-1, -1};  // image * padded height + row, of what is in `expanded`

    const auto expand = [&](int64_t image, int64_t row, int slot) {
      const int64_t y = row - border;
      if (y < 0 || y >= height) {
        std::fill_n(padded, width + 2 * border, T{0});
      } else {
        const int64_t first = (image * height + y) * width;
        load_as(st.const_data_ptr(), st.scalar_type(), first, width, st_row);
        load_as(ae.const_data_ptr(), ae.scalar_type(), first, width, ae_row);
        EFFICIENTAD_FAST_DISPATCH(combine_row<T>, st_row, ae_row, static_cast<T>(folded.st), static_cast<T>(folded.ae),
                                  static_cast<T>(folded.inside), width, padded + border);
        std::fill_n(padded, border, T{0});
        std::fill_n(padded + border + width, border, T{0});
      }
      if (columns.is_copy) {
        std::copy_n(padded, out_width, expanded[slot]);
        return;
      }
      EFFICIENTAD_FAST_DISPATCH(expand_row<T>, padded, columns.left.data(), columns.right.data(), columns.weight.data(),
                                out_width, expanded[slot]);
    };

    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / out_height, y = index % out_height;
      const int64_t first = image * (height + 2 * border);
      const int64_t wanted[2] = {first + rows.left[y], first + rows.right[y]};
      if (held[1] == wanted[0]) {
        std::swap(held[0], held[1]);
        std::swap(expanded[0], expanded[1]);
      }
      const int needed = rows.is_copy || wanted[1] == wanted[0] ? 1 : 2;
      for (int slot = 0; slot < needed; ++slot) {
        if (held[slot] != wanted[slot]) {
          held[slot] = wanted[slot];
          expand(image, wanted[slot] - first, slot);
        }
      }
      const T* const lower = rows.is_copy ? zeros : expanded[needed - 1];
      row_maxima[index] = EFFICIENTAD_FAST_DISPATCH(blend_rows<T>, expanded[0], lower, rows.weight[y],
                                                    static_cast<T>(folded.outside), out_width, map + index * out_width);
    }
  });

  T* const scores = static_cast<T*>(score.mutable_data_ptr());
  for (int64_t image = 0; image < images; ++image) {
    T largest = -std::numeric_limits<T>::infinity();
    for (int64_t y = 0; y < out_height; ++y) {
      const T value = row_maxima[image * out_height + y];
      largest = value > largest || value != value ? value : largest;
      if (largest != largest) {
        break;
      }
    }
    scores[image] = largest;
  }
}

void anomaly_map_out(const Tensor& map_st, const Tensor& map_ae, std::optional<std::vector<double>> quantiles,
                     int64_t border, std::string convention, Tensor out, Tensor score) {
  anomaly_map::check_maps(map_st, map_ae, /*cuda=*/false);
  anomaly_map::check_outputs(map_st, map_ae, out, score);
  const auto folded = anomaly_map::checked_coefficients(quantiles, border, convention);
  if (out.scalar_type() == ScalarType::Double) {
    compute<double>(map_st, map_ae, folded, border, out, score);
  } else {
    compute<float>(map_st, map_ae, folded, border, out, score);
  }
}

std::tuple<Tensor, Tensor> anomaly_map_default(const Tensor& map_st, const Tensor& map_ae, std::vector<int64_t> size,
                                               std::optional<std::vector<double>> quantiles, int64_t border,
                                               std::string convention) {
  anomaly_map::check_maps(map_st, map_ae, /*cuda=*/false);
  require_positive_size("anomaly_map", size);
  const ScalarType dtype = anomaly_map::result_dtype(map_st, map_ae);
  Tensor out = torch::stable::new_empty(map_st, {map_st.size(0), 1, size[0], size[1]}, dtype);
  Tensor score = torch::stable::new_empty(map_st, {map_st.size(0)}, dtype);
  anomaly_map_out(map_st, map_ae, std::move(quantiles), border, std::move(convention), out, score);
  return {out, score};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> drop_in(const Tensor& map_st, const Tensor& map_ae,
                                           const std::optional<Tensor>& st_quantiles,
                                           const std::optional<Tensor>& ae_quantiles) {
  const int64_t count = map_st.numel();
  const auto empty = [&](ScalarType dtype) { return torch::stable::new_empty(map_st, map_st.sizes(), dtype); };
  Tensor combined = empty(anomaly_map::promoted(map_st.scalar_type(), map_ae.scalar_type()));
  Tensor results[2] = {empty(map_st.scalar_type()), empty(map_ae.scalar_type())};
  const Tensor sources[2] = {torch::stable::contiguous(map_st), torch::stable::contiguous(map_ae)};
  const std::optional<Tensor> quantiles[2] = {st_quantiles, ae_quantiles};
  T start[2] = {}, divisor[2] = {};
  for (int which = 0; which < 2; ++which) {
    if (quantiles[which]) {
      const Tensor dense = torch::stable::contiguous(*quantiles[which]);
      double pair[2];
      load_as(dense.const_data_ptr(), dense.scalar_type(), 0, 2, pair);
      start[which] = static_cast<T>(pair[0]);
      divisor[which] = static_cast<T>(pair[1] - pair[0]);
    }
  }
  parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    constexpr int64_t kBlock = 256;
    T values[2][kBlock];
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t block = std::min(kBlock, end - first);
      for (int which = 0; which < 2; ++which) {
        load_as(sources[which].const_data_ptr(), sources[which].scalar_type(), first, block, values[which]);
        if (quantiles[which]) {
          for (int64_t i = 0; i < block; ++i) {
            values[which][i] = T(0.1) * (values[which][i] - start[which]) / divisor[which];
          }
        }
        store_as(values[which], results[which].mutable_data_ptr(), results[which].scalar_type(), first, block);
      }
      for (int64_t i = 0; i < block; ++i) {
        values[0][i] = T(0.5) * values[0][i] + T(0.5) * values[1][i];
      }
      store_as(values[0], combined.mutable_data_ptr(), combined.scalar_type(), first, block);
    }
  });
  return {combined, results[0], results[1]};
}

std::tuple<Tensor, Tensor, Tensor> anomaly_map_drop_in(const Tensor& map_st, const Tensor& map_ae,
                                                       std::optional<Tensor> st_quantiles,
                                                       std::optional<Tensor> ae_quantiles) {
  anomaly_map::check_drop_in(map_st, map_ae, st_quantiles, ae_quantiles, /*cuda=*/false);
  const bool exact = map_st.scalar_type() == ScalarType::Double || map_ae.scalar_type() == ScalarType::Double;
  return (exact ? drop_in<double> : drop_in<float>)(map_st, map_ae, st_quantiles, ae_quantiles);
}

}  // namespace

}  // namespace efficientad_fast

#define EFFICIENTAD_FAST_REGISTER(library)                                                   \
  STABLE_TORCH_LIBRARY_IMPL(library, CPU, m) {                                               \
    m.impl("anomaly_map", TORCH_BOX(&efficientad_fast::anomaly_map_default));                \
    m.impl("anomaly_map.out", TORCH_BOX(&efficientad_fast::anomaly_map_out));                \
    m.impl("anomaly_map.drop_in", TORCH_BOX(&efficientad_fast::anomaly_map_drop_in));        \
  }
EFFICIENTAD_FAST_REGISTER(efficientad_fast)
EFFICIENTAD_FAST_REGISTER(efficientad_fast_cpu)
