// anomaly_map on a GPU: device code and launches, without framework types.
// efficientad_fast/ops/anomaly_map.py is the contract.

#pragma once

#include "device.h"
#include "numbers.h"

#include <cstdint>
#include <limits>
#include <type_traits>

namespace efficientad_fast::cuda {

inline constexpr int kMapColumns = 4;  // of the anomaly map, per thread
inline constexpr int kMapWarps = 8;
inline constexpr int kMapThreads = 32 * kMapWarps;
inline constexpr int kMapTileWidth = 32 * kMapColumns;
inline constexpr int kMapMaxRows = 16;            // of the anomaly map, one after the other, per thread
inline constexpr int64_t kMapEnoughBlocks = 256;  // fewer leave multiprocessors of a large GPU idle
inline constexpr int kScoreThreads = 128;
inline constexpr int kDropInThreads = 128;

template <typename T>
inline constexpr T kLowest = -std::numeric_limits<T>::infinity();

struct RawMap {
  const void* data;
  Dtype dtype;
  int64_t image_stride, row_stride, column_stride;  // in elements
};

// One call. anomaly_map = resize(pad(a * st + b * ae + inside)) + outside; sides are below 2^30.
struct AnomalyMap {
  RawMap st, ae;
  int64_t images;
  int height, width, border;
  int out_height, out_width;
  double a, b, inside, outside;
  void *out, *score;  // contiguous; float64 where both maps are, else float32
};

// What a launch adds to a call. T is the type of the results and of the arithmetic.
template <typename T>
struct AnomalyMapLaunch {
  AnomalyMap call;
  T a, b, inside, outside;
  T row_scale, column_scale;  // padded side / output side
  int rows;                   // of the anomaly map, per thread
  int tiles_across, tiles_down;
  bool wide;  // rows of the anomaly map are whole vectors
  bool same;  // the size is that of the padded maps: a copy, also of inf
};

// Where output i of a bilinear resize reads (align_corners=False): `left` and the one `step` further.
template <typename T>
struct Between {
  int left, step;
  T weight;  // of the latter

  __device__ __forceinline__ Between(int i, int length, int target, T scale) {
    T position = (static_cast<T>(i) + T(0.5)) * scale - T(0.5);
    position = position > T(0) ? position : T(0);
    left = min(static_cast<int>(position), length - 1);
    step = left < length - 1 && length != target ? 1 : 0;
    weight = position - static_cast<T>(left);
    weight = weight < T(1) ? weight : T(1);
  }
};

// The larger of two, NaN where either is.
template <typename T>
__device__ __forceinline__ T larger(T a, T b) {
  return b > a || b != b ? b : a;
}

// score = larger(score, value), between blocks. As signed integers, the bits of numbers that are not negative are in
// the numbers' order; as unsigned ones, those of negative numbers are in the opposite order, beyond all others. A
// positive NaN is the largest of the former.
__device__ __forceinline__ void raise_score(float* score, float value) {
  const int bits = value != value ? 0x7fffffff : __float_as_int(value);
  if (bits >= 0) {
    atomicMax(reinterpret_cast<int*>(score), bits);
  } else {
    atomicMin(reinterpret_cast<unsigned*>(score), static_cast<unsigned>(bits));
  }
}

__device__ __forceinline__ void raise_score(double* score, double value) {
  auto* const place = reinterpret_cast<unsigned long long*>(score);
  const auto wanted = static_cast<unsigned long long>(__double_as_longlong(value));
  auto held = static_cast<unsigned long long>(__double_as_longlong(kLowest<double>));
  for (;;) {
    const unsigned long long found = atomicCAS(place, held, wanted);
    const double other = __longlong_as_double(static_cast<long long>(found));
    if (found == held || other != other || value <= other) {
      return;
    }
    held = found;
  }
}

// The combined map at (row, column) of its padded form.
template <typename T, typename Element>
__device__ __forceinline__ T combined_at(const AnomalyMapLaunch<T>& p, int64_t image, int row, int column) {
  const AnomalyMap& call = p.call;
  const int y = row - call.border, x = column - call.border;
  if (y < 0 || y >= call.height || x < 0 || x >= call.width) {
    return T(0);
  }
  const auto raw = [=](const RawMap& map) {
    const int64_t index = image * map.image_stride + y * map.row_stride + x * map.column_stride;
    return load<T, Element>(map.data, map.dtype, index);
  };
  return p.a * raw(call.st) + p.b * raw(call.ae) + p.inside;
}

// Before resize_maps, in a launch of its own: blocks of one image raise its score in any order, and neither a counter
// kept between launches nor its reset would survive two streams, or a graph that is cut short.
template <typename T>
__global__ void __launch_bounds__(kScoreThreads) reset_scores(T* score, int64_t images) {
  const int64_t image = static_cast<int64_t>(blockIdx.x) * kScoreThreads + threadIdx.x;
  if (image < images) {
    score[image] = kLowest<T>;
  }
}

// A warp makes `rows` rows of the anomaly map, 128 pixels wide. Consecutive rows mostly lie between the same two rows
// of the maps, whose horizontal interpolation is kept.
template <typename T, typename Element>
__global__ void __launch_bounds__(kMapThreads) resize_maps(const AnomalyMapLaunch<T> p) {
  __shared__ T warp_largest[kMapWarps];
  const AnomalyMap& call = p.call;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tile_x = blockIdx.x % p.tiles_across, tile = blockIdx.x / p.tiles_across;
  const int tile_y = tile % p.tiles_down, image = tile / p.tiles_down;
  const int padded_height = call.height + 2 * call.border, padded_width = call.width + 2 * call.border;

  // Neighbouring pixels for one vector, or far enough apart for a warp's scalars to be neighbours.
  const int apart = p.wide ? 1 : 32;
  const int first_column = tile_x * kMapTileWidth + lane * (p.wide ? kMapColumns : 1);
  int left[kMapColumns], step[kMapColumns];
  T weight[kMapColumns];
#pragma unroll
  for (int j = 0; j < kMapColumns; ++j) {
    const Between<T> columns(min(first_column + j * apart, call.out_width - 1), padded_width, call.out_width,
                             p.column_scale);
    left[j] = columns.left, step[j] = columns.step, weight[j] = columns.weight;
  }
  const auto blend = [&](T first, T second, T share) {
    return p.same ? first : (T(1) - share) * first + share * second;
  };
  const auto expand = [&](int row, T(&values)[kMapColumns]) {
#pragma unroll
    for (int j = 0; j < kMapColumns; ++j) {
      values[j] = blend(combined_at<T, Element>(p, image, row, left[j]),
                        combined_at<T, Element>(p, image, row, left[j] + step[j]), weight[j]);
    }
  };

  T largest = kLowest<T>;
  T upper[kMapColumns], lower[kMapColumns];
  int upper_row = -1, lower_row = -1;  // of the padded maps, held in `upper` and `lower`
  const int first_row = (tile_y * kMapWarps + warp) * p.rows;
  const int last_row = min(first_row + p.rows, call.out_height);
  for (int y = first_row; y < last_row; ++y) {
    const Between<T> rows(y, padded_height, call.out_height, p.row_scale);
    if (rows.left != upper_row) {
      if (rows.left == lower_row) {
#pragma unroll
        for (int j = 0; j < kMapColumns; ++j) {
          upper[j] = lower[j];
        }
      } else {
        expand(rows.left, upper);
      }
      upper_row = rows.left;
    }
    if (rows.left + rows.step != lower_row) {
      lower_row = rows.left + rows.step;
      expand(lower_row, lower);
    }
    T* const out = static_cast<T*>(call.out) + (static_cast<int64_t>(image) * call.out_height + y) * call.out_width;
    Vector<T> packed[kMapColumns / Vector<T>::kCount];
#pragma unroll
    for (int j = 0; j < kMapColumns; ++j) {
      const T value = blend(upper[j], lower[j], rows.weight) + p.outside;
      const int x = first_column + j * apart;
      if (x < call.out_width) {
        largest = larger(largest, value);
        if (!p.wide) {
          out[x] = value;
        }
      }
      packed[j / Vector<T>::kCount].element[j % Vector<T>::kCount] = value;
    }
    if (p.wide && first_column < call.out_width) {
#pragma unroll
      for (int j = 0; j < kMapColumns; j += Vector<T>::kCount) {
        *reinterpret_cast<Vector<T>*>(out + first_column + j) = packed[j / Vector<T>::kCount];
      }
    }
  }

#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  }
  if (lane == 0) {
    warp_largest[warp] = largest;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int other = 1; other < kMapWarps; ++other) {
      largest = larger(largest, warp_largest[other]);
    }
    raise_score(static_cast<T*>(call.score) + image, largest);
  }
}

// Blocks of resize_maps when each thread makes `rows` rows.
inline int64_t anomaly_map_blocks(const AnomalyMap& call, int rows) {
  const int64_t across = (call.out_width + kMapTileWidth - 1) / kMapTileWidth;
  const int64_t tile_height = static_cast<int64_t>(kMapWarps) * rows;
  return call.images * across * ((call.out_height + tile_height - 1) / tile_height);
}

template <typename T>
void launch_anomaly_map_as(const AnomalyMap& call, cudaStream_t stream) {
  AnomalyMapLaunch<T> p{};
  p.call = call;
  p.a = static_cast<T>(call.a), p.b = static_cast<T>(call.b);
  p.inside = static_cast<T>(call.inside), p.outside = static_cast<T>(call.outside);
  const int padded_height = call.height + 2 * call.border, padded_width = call.width + 2 * call.border;
  p.row_scale = static_cast<T>(padded_height) / static_cast<T>(call.out_height);
  p.column_scale = static_cast<T>(padded_width) / static_cast<T>(call.out_width);
  p.same = padded_height == call.out_height && padded_width == call.out_width;
  p.wide = call.out_width % kMapColumns == 0 && is_aligned(call.out);
  p.rows = kMapMaxRows;
  while (p.rows > 1 && anomaly_map_blocks(call, p.rows) < kMapEnoughBlocks) {
    p.rows /= 2;
  }
  p.tiles_across = (call.out_width + kMapTileWidth - 1) / kMapTileWidth;
  p.tiles_down = (call.out_height + kMapWarps * p.rows - 1) / (kMapWarps * p.rows);
  const auto blocks = static_cast<unsigned>(anomaly_map_blocks(call, p.rows));
  const auto score_blocks = static_cast<unsigned>((call.images + kScoreThreads - 1) / kScoreThreads);
  launch(reset_scores<T>, dim3(score_blocks), dim3(kScoreThreads), 0, stream, static_cast<T*>(call.score), call.images);
  with_element(call.st.dtype, call.ae.dtype, [&](auto element) {
    using Element = decltype(element);
    // Both maps in float64 make float64, and nothing else does.
    if constexpr (std::is_same_v<T, double> == std::is_same_v<Element, double>) {
      launch(resize_maps<T, Element>, dim3(blocks), dim3(kMapThreads), 0, stream, p);
    }
  });
}

// No image: nothing to launch.
inline void launch_anomaly_map(const AnomalyMap& call, cudaStream_t stream) {
  if (call.images == 0) {
    return;
  }
  if (call.st.dtype == Dtype::kFloat64 && call.ae.dtype == Dtype::kFloat64) {
    launch_anomaly_map_as<double>(call, stream);
  } else {
    launch_anomaly_map_as<float>(call, stream);
  }
}

// The drop-in function's maps, all contiguous and of `count` elements.
struct DropIn {
  const void *st, *ae;
  void *st_result, *ae_result, *combined;
  Dtype st_dtype, ae_dtype, combined_dtype;
  const void *st_quantiles, *ae_quantiles;  // start and end, or null
  Dtype st_quantile_dtype, ae_quantile_dtype;
  int64_t st_quantile_stride, ae_quantile_stride;
  int64_t count;
  bool aligned;  // to vectors, all five
};

// 0.1 (value - start) / (end - start), in the order of operations of the reference.
template <typename T>
struct QuantileScale {
  bool given;
  T start, divisor;

  __device__ __forceinline__ QuantileScale(const void* quantiles, Dtype dtype, int64_t stride)
      : given(quantiles != nullptr), start(0), divisor(1) {
    if (given) {
      const double first = load<double, AnyDtype>(quantiles, dtype, 0);
      start = static_cast<T>(first);
      divisor = static_cast<T>(load<double, AnyDtype>(quantiles, dtype, stride) - first);
    }
  }

  __device__ __forceinline__ T operator()(T value) const { return given ? T(0.1) * (value - start) / divisor : value; }
};

template <typename T, typename Element>
__global__ void __launch_bounds__(kDropInThreads) normalise_maps(const DropIn p) {
  const QuantileScale<T> st_scale(p.st_quantiles, p.st_quantile_dtype, p.st_quantile_stride);
  const QuantileScale<T> ae_scale(p.ae_quantiles, p.ae_quantile_dtype, p.ae_quantile_stride);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDropInThreads + threadIdx.x;
  int64_t first = thread, last = first + 1;
  if constexpr (!std::is_same_v<Element, AnyDtype>) {
    using Elements = Vector<Element>;
    first = thread * Elements::kCount, last = first + Elements::kCount;
    if (p.aligned && last <= p.count) {
      Elements st = static_cast<const Elements*>(p.st)[thread], ae = static_cast<const Elements*>(p.ae)[thread];
      Elements combined;
#pragma unroll
      for (int i = 0; i < Elements::kCount; ++i) {
        const T st_value = st_scale(to_number<T>(st.element[i])), ae_value = ae_scale(to_number<T>(ae.element[i]));
        st.element[i] = to_element<Element>(st_value);
        ae.element[i] = to_element<Element>(ae_value);
        combined.element[i] = to_element<Element>(T(0.5) * st_value + T(0.5) * ae_value);
      }
      static_cast<Elements*>(p.st_result)[thread] = st;
      static_cast<Elements*>(p.ae_result)[thread] = ae;
      static_cast<Elements*>(p.combined)[thread] = combined;
      return;
    }
  }
  for (int64_t i = first; i < last && i < p.count; ++i) {
    const T st_value = st_scale(load<T, Element>(p.st, p.st_dtype, i));
    const T ae_value = ae_scale(load<T, Element>(p.ae, p.ae_dtype, i));
    store<Element>(st_value, p.st_result, p.st_dtype, i);
    store<Element>(ae_value, p.ae_result, p.ae_dtype, i);
    store<Element>(T(0.5) * st_value + T(0.5) * ae_value, p.combined, p.combined_dtype, i);
  }
}

inline void launch_drop_in(DropIn call, cudaStream_t stream) {
  if (call.count == 0) {
    return;
  }
  call.aligned = is_aligned(call.st) && is_aligned(call.ae) && is_aligned(call.st_result) &&
                 is_aligned(call.ae_result) && is_aligned(call.combined);
  const auto start = [&](auto kernel, int64_t per_thread) {
    const int64_t per_block = kDropInThreads * per_thread;
    const auto blocks = static_cast<unsigned>((call.count + per_block - 1) / per_block);
    launch(kernel, dim3(blocks), dim3(kDropInThreads), 0, stream, call);
  };
  with_element(call.st_dtype, call.ae_dtype, [&](auto element) {
    using Element = decltype(element);
    if constexpr (!std::is_same_v<Element, AnyDtype>) {
      using T = std::conditional_t<std::is_same_v<Element, double>, double, float>;
      start(normalise_maps<T, Element>, Vector<Element>::kCount);
    } else if (call.st_dtype == Dtype::kFloat64 || call.ae_dtype == Dtype::kFloat64) {
      start(normalise_maps<double, AnyDtype>, 1);
    } else {
      start(normalise_maps<float, AnyDtype>, 1);
    }
  });
}

}  // namespace efficientad_fast::cuda
