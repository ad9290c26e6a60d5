#include "convolution.h"

#include "level.h"
#include "winograd.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace efficientad_fast::convolution {

namespace {

// A tile, or an output, of an image.
struct Place {
  int64_t image, y, x;
};

// What all blocks of a convolution share.
struct Work {
  Source sources[2];
  Packed packed;
  Epilogue epilogue;
  Result result;
  int64_t stride = 1;
  int64_t tile = 1, filter = 1;      // F(tile, filter); tile 1 is the direct way
  int64_t outputs = 0;               // channels of a group's results
  int64_t height = 0, width = 0;     // of the convolution, before pooling
  int64_t places_y = 0, places_x = 0;
  bool squares = false;
  float scale = 0;                   // of the sums of squares

  Place place(int64_t index) const {
    return {index / (places_y * places_x), index / places_x % places_y, index % places_x};
  }
};

// Places of one group, and how many rows of V and M they are.
struct Block {
  int64_t group, first, count, rows;
};

#define EFFICIENTAD_FAST_KERNEL "convolution_kernel.h"
#include "for_each_level.h"

// Rows of a block: two or four times what stays in registers. More of them where the weights, which every block reads
// from end to end, are larger than a processor's share of the last cache.
constexpr int64_t kRows = 28, kRowsForLargeWeights = 56, kDirectRows = 112;
constexpr int64_t kLargeWeights = int64_t{4} << 20;  // numbers

int64_t numbers_of_row(const Work& work) {
  return work.packed.planes * (work.packed.depth + kPanel) + (work.squares ? work.tile * work.tile * kChunk : 0);
}

void run_all(Work& work, int64_t groups, const Workspace& workspace) {
  const bool pool = work.epilogue.pool;
  const int64_t step = work.tile == 1 ? 1 : pool ? work.tile / 2 : work.tile;
  work.places_y = divided_up(work.result.height, step);
  work.places_x = divided_up(work.result.width, step);
  const int64_t places = work.result.images * work.places_y * work.places_x;
  if (places == 0) {
    return;
  }
  const int64_t rows_of_place = work.tile == 1 && pool ? 4 : 1;
  const int64_t weights = work.packed.panels * work.packed.planes * work.packed.depth * kPanel;
  const int64_t spare = 2 * work.packed.planes * kChunk;  // what planes are set apart by
  const int64_t most = (kWorkspace - spare) / numbers_of_row(work);
  const int64_t wanted = work.tile == 1 ? kDirectRows : weights > kLargeWeights ? kRowsForLargeWeights : kRows;
  const int64_t block_places = std::max<int64_t>(std::min(most, wanted) / rows_of_place, 1);

  const int64_t allowed = std::min<int64_t>(workspace.threads, torch::stable::get_num_threads());
  // As many as share out evenly among the threads.
  const int64_t fewest = divided_up(places, block_places) * groups;
  const int64_t blocks = std::min(divided_up(rounded_up(fewest, allowed), groups), places);
  const int64_t tasks = blocks * groups;
  const int64_t threads = std::min(allowed, tasks);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; ++task) {
        const int64_t index = task % blocks;
        const int64_t first = places * index / blocks, count = places * (index + 1) / blocks - first;
        const Block block{task / blocks, first, count, count * rows_of_place};
        EFFICIENTAD_FAST_DISPATCH(run, work, block, workspace.data + thread * workspace.stride);
      }
    }
  });
}

// M of F(M x M, filter x filter) with that number of planes; 1 for the direct way.
int64_t tile_of(int64_t planes, int64_t filter) {
  return planes == 1 ? 1 : planes == packing::planes_of(4, filter) ? 4 : 6;
}

template <int M, int R>
void transform_weights(const double* weight, int64_t kernel, double* planes) {
  constexpr auto& matrices = winograd::kMatrices<M, R>;
  constexpr int kInputs = M + R - 1;
  double half[kInputs][R];
  for (int i = 0; i < kInputs; ++i) {
    for (int x = 0; x < R; ++x) {
      half[i][x] = 0;
      for (int y = 0; y < R; ++y) {
        half[i][x] += y < kernel && x < kernel ? matrices.weight[i][y].value() * weight[y * kernel + x] : 0;
      }
    }
  }
  for (int i = 0; i < kInputs; ++i) {
    for (int j = 0; j < kInputs; ++j) {
      double sum = 0;
      for (int x = 0; x < R; ++x) {
        sum += half[i][x] * matrices.weight[j][x].value();
      }
      planes[i * kInputs + j] = sum;
    }
  }
}

}  // namespace

void convolve(const Source& source, int64_t groups, int64_t stride, const Packed& packed, const Epilogue& epilogue,
              const Result& result, const Workspace& workspace) {
  Work work;
  work.sources[0] = source;
  work.packed = packed;
  work.epilogue = epilogue;
  work.result = result;
  work.stride = stride;
  work.tile = tile_of(packed.planes, source.kernel);
  work.filter = source.kernel;
  work.outputs = result.channels / groups;
  work.height = (source.height + 2 * source.padding - source.kernel) / stride + 1;
  work.width = (source.width + 2 * source.padding - source.kernel) / stride + 1;
  run_all(work, groups, workspace);
}

void distance(const Source& first, const Source& second, const Packed& packed, const float* bias, int64_t channels,
              const Result& result, const Workspace& workspace) {
  Work work;
  work.sources[0] = first;
  work.sources[1] = second;
  work.packed = packed;
  work.epilogue.bias = bias;
  work.result = result;
  work.filter = second.data == nullptr ? first.kernel : std::max(first.kernel, second.kernel);
  work.tile = tile_of(packed.planes, work.filter);
  work.outputs = channels;
  work.height = result.height;
  work.width = result.width;
  work.squares = true;
  work.scale = static_cast<float>(1.0 / static_cast<double>(channels));
  run_all(work, 1, workspace);
}

void pack(const Weights& weights, const Packed& layout, float* packed) {
  const int64_t kernel = weights.kernel, channels = weights.channels, planes = layout.planes;
  const int64_t tile = tile_of(planes, weights.filter);
  const auto transform = tile == 4 ? (weights.filter == 3 ? transform_weights<4, 3> : transform_weights<4, 4>)
                                   : (weights.filter == 3 ? transform_weights<6, 3> : transform_weights<6, 4>);
  torch::stable::parallel_for(0, layout.panels, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> taps(kernel * kernel), transformed(planes);
    for (int64_t output = begin * kPanel; output < std::min(end * kPanel, weights.outputs); ++output) {
      float* const panel = packed + output / kPanel * planes * layout.depth * kPanel + output % kPanel;
      for (int64_t channel = 0; channel < channels; ++channel) {
        const float* const from = weights.data + (output * channels + channel) * kernel * kernel;
        for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
          taps[tap] = weights.scale * from[tap];
        }
        if (tile == 1) {
          for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
            panel[(weights.first + tap * channels + channel) * kPanel] = static_cast<float>(taps[tap]);
          }
          continue;
        }
        transform(taps.data(), kernel, transformed.data());
        for (int64_t plane = 0; plane < planes; ++plane) {
          panel[(plane * layout.depth + weights.first + channel) * kPanel] = static_cast<float>(transformed[plane]);
        }
      }
    }
  });
}

void resize(const float* from, int64_t height, int64_t width, int64_t channels, float* to, int64_t to_height,
            int64_t to_width, int64_t threads) {
  // Where output i lies between two of the image, and how far along.
  const auto position = [](int64_t i, int64_t length, int64_t target, int64_t& left, int64_t& right, float& along) {
    const double scale = static_cast<double>(length) / static_cast<double>(target);
    const double at = std::max((static_cast<double>(i) + 0.5) * scale - 0.5, 0.0);
    left = std::min(static_cast<int64_t>(at), length - 1);
    right = std::min(left + 1, length - 1);
    along = static_cast<float>(at - static_cast<double>(left));
  };
  std::vector<int64_t> left(to_width), right(to_width);
  std::vector<float> along(to_width);
  for (int64_t x = 0; x < to_width; ++x) {
    position(x, width, to_width, left[x], right[x], along[x]);
  }
  const int64_t row = width * channels;
  const auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      int64_t upper, lower;
      float down;
      position(y, height, to_height, upper, lower, down);
      EFFICIENTAD_FAST_DISPATCH(resize_row, from + upper * row, from + lower * row, down, channels, left.data(),
                                right.data(), along.data(), to_width, to + y * to_width * channels);
    }
  };
  if (threads == 1) {
    rows(0, to_height);
  } else {
    torch::stable::parallel_for(0, to_height, 8, rows);
  }
}

}  // namespace efficientad_fast::convolution
