// The three steps of a convolution, over a block of rows. Included by for_each_level.h; convolution.h says what a block
// is. A row is a tile of Winograd's, or one output of the convolution where there is no transform (then there is one
// plane). Outputs that are pooled together are four rows, one after the other.
//
// V, what is multiplied:  [plane][chunk of kChunk channels][row][kChunk], planes `v_plane` numbers apart
// U, packed weights:      [plane][channel][kPanel outputs], of one panel
// M, products:            [plane][row][kPanel], planes `m_plane` numbers apart

typedef float Vector __attribute__((vector_size(4 * EFFICIENTAD_FAST_LANES)));
constexpr int kLanes = EFFICIENTAD_FAST_LANES;
// Rows and vectors of products that stay in registers, beside the two vectors of weights and the number they multiply.
constexpr int kMostRows = EFFICIENTAD_FAST_REGISTERS == 32 ? 14 : 6;
constexpr int kWide = 2;
constexpr int kFewChannels = 4;

// std::min, compiled for this level.
inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

inline __attribute__((always_inline)) Vector load(const float* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

inline __attribute__((always_inline)) void store(float* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

// M[row][...] = sum over channels of V[channel][row] * U[channel][...], for kWide vectors of outputs, and the first
// CHANNELS of each chunk (the others hold zeros). Meanwhile `lines`
// cache lines a chunk are fetched from `ahead`: weights come from beyond the second-level cache.
template <int ROWS, int CHANNELS>
__attribute__((noinline)) void multiply_rows(const float* v, int64_t chunk_stride, const float* u, int64_t chunks,
                                             float* m, const float* ahead, int64_t lines) {
  Vector sum[ROWS][kWide];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 2
    for (int wide = 0; wide < kWide; ++wide) {
      sum[row][wide] = Vector{};
    }
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk, v += chunk_stride) {
    for (int64_t line = 0; line < lines; ++line, ahead += kChunk) {
      __builtin_prefetch(ahead, 0, 2);
    }
#pragma GCC unroll 4
    for (int channel = 0; channel < CHANNELS; ++channel, u += kPanel) {
      const Vector first = load(u), second = load(u + kLanes);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        const float value = v[row * kChunk + channel];
        sum[row][0] += value * first;
        sum[row][1] += value * second;
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 2
    for (int wide = 0; wide < kWide; ++wide) {
      store(m + row * kPanel + wide * kLanes, sum[row][wide]);
    }
  }
}

template <int CHANNELS, int ROWS>
inline void multiply_rest(int64_t rows, const float* v, int64_t chunk_stride, const float* u, int64_t chunks, float* m,
                          const float* ahead, int64_t lines) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      multiply_rows<ROWS, CHANNELS>(v, chunk_stride, u, chunks, m, ahead, lines);
    } else {
      multiply_rest<CHANNELS, ROWS - 1>(rows, v, chunk_stride, u, chunks, m, ahead, lines);
    }
  }
}

// One plane of a block, all outputs of a panel. Rows are shared out evenly: 13 + 13 rather than 14 + 12.
template <int CHANNELS>
void multiply(const float* v, int64_t rows, const float* u, int64_t chunks, float* m) {
  const int64_t parts = (rows + kMostRows - 1) / kMostRows;
  constexpr int kColumns = kPanel / (kWide * kLanes);
  // The next plane's weights lie behind these; each part fetches its share.
  const int64_t lines = (2 * kChunk + parts * kColumns - 1) / (parts * kColumns);
  const float* ahead = u + chunks * kChunk * kPanel;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
    for (int column = 0; column < kColumns; ++column, ahead += lines * chunks * kChunk) {
      const int64_t at = column * kWide * kLanes;
      multiply_rest<CHANNELS, kMostRows>(count, v + first * kChunk, rows * kChunk, u + at, chunks, m + first * kPanel + at, ahead,
                               lines);
    }
  }
}

template <int M, int R>
struct Transforms {
  static constexpr auto& kMatrix = winograd::kMatrices<M, R>;
  static constexpr int kInputs = M + R - 1, kPairs = winograd::Matrices<M, R>::kPairs;

  // sum + c * x, where c is known and often 0, 1 or -1.
  static inline __attribute__((always_inline)) Vector plus(Vector sum, double c, Vector x, bool first) {
    return c == 1 ? (first ? x : sum + x) : first ? static_cast<float>(c) * x : sum + static_cast<float>(c) * x;
  }

  // B^T in, for one column.
  static inline __attribute__((always_inline)) void input(const Vector (&in)[kInputs], Vector (&out)[kInputs]) {
#pragma GCC unroll 16
    for (int j = 0; j < kInputs; ++j) {
      if (j < 2 * kPairs && j % 2 == 1) {
        continue;
      }
      Vector even{}, odd{};
      bool no_even = true, no_odd = true;
#pragma GCC unroll 16
      for (int n = kInputs - 1; n >= 0; --n) {
        const double c = kMatrix.input[j][n].value();
        if (c == 0) {
          continue;
        }
        if (n % 2 == 0) {
          even = plus(even, c, in[n], no_even);
          no_even = false;
        } else {
          odd = plus(odd, c, in[n], no_odd);
          no_odd = false;
        }
      }
      if (j < 2 * kPairs) {
        out[j] = even + odd;
        out[j + 1] = even - odd;
      } else {
        out[j] = no_odd ? even : no_even ? odd : even + odd;
      }
    }
  }

  // A^T in.
  static inline __attribute__((always_inline)) void output(const Vector (&in)[kInputs], Vector (&out)[M]) {
    Vector sum[kPairs], difference[kPairs];
#pragma GCC unroll 8
    for (int pair = 0; pair < kPairs; ++pair) {
      sum[pair] = in[2 * pair] + in[2 * pair + 1];
      difference[pair] = in[2 * pair] - in[2 * pair + 1];
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      Vector total{};
      bool first = true;
#pragma GCC unroll 8
      for (int pair = 0; pair < kPairs; ++pair) {
        total = plus(total, kMatrix.output[i][2 * pair].value(), i % 2 == 0 ? sum[pair] : difference[pair], first);
        first = false;
      }
#pragma GCC unroll 2
      for (int j = 2 * kPairs; j < kInputs; ++j) {
        if (kMatrix.output[i][j].value() != 0) {
          total = plus(total, kMatrix.output[i][j].value(), in[j], false);
        }
      }
      out[i] = total;
    }
  }
};

// V of one tile and chunk: pixels `row` and `pixel` numbers apart.
template <int M, int R>
inline void transform_input(const float* from, int64_t row, int64_t pixel, float* v, int64_t v_plane) {
  using T = Transforms<M, R>;
  constexpr int kInputs = T::kInputs;
  for (int lane = 0; lane < kChunk; lane += kLanes) {
    Vector half[kInputs][kInputs];
#pragma GCC unroll 1
    for (int x = 0; x < kInputs; ++x) {
      Vector in[kInputs], out[kInputs];
#pragma GCC unroll 16
      for (int y = 0; y < kInputs; ++y) {
        in[y] = load(from + y * row + x * pixel + lane);
      }
      T::input(in, out);
#pragma GCC unroll 16
      for (int y = 0; y < kInputs; ++y) {
        half[y][x] = out[y];
      }
    }
#pragma GCC unroll 1
    for (int y = 0; y < kInputs; ++y) {
      Vector in[kInputs], out[kInputs];
#pragma GCC unroll 16
      for (int x = 0; x < kInputs; ++x) {
        in[x] = half[y][x];
      }
      T::input(in, out);
#pragma GCC unroll 16
      for (int x = 0; x < kInputs; ++x) {
        store(v + (y * kInputs + x) * v_plane + lane, out[x]);
      }
    }
  }
}

// Outputs of one tile and one vector of channels.
template <int M, int R>
inline __attribute__((always_inline)) void transform_output(const float* m, int64_t m_plane, Vector (&out)[M][M]) {
  using T = Transforms<M, R>;
  constexpr int kInputs = T::kInputs;
  Vector half[M][kInputs];
#pragma GCC unroll 1
  for (int x = 0; x < kInputs; ++x) {
    Vector in[kInputs], column[M];
#pragma GCC unroll 16
    for (int y = 0; y < kInputs; ++y) {
      in[y] = load(m + (y * kInputs + x) * m_plane);
    }
    T::output(in, column);
#pragma GCC unroll 8
    for (int y = 0; y < M; ++y) {
      half[y][x] = column[y];
    }
  }
#pragma GCC unroll 1
  for (int y = 0; y < M; ++y) {
    T::output(half[y], out[y]);
  }
}

inline __attribute__((always_inline)) Vector rectified(Vector x) {
  const Vector zero{};
  return zero > x ? zero : x;  // in this order a NaN stays
}

// `count` channels, at most a vector of them.
inline __attribute__((always_inline)) void store_some(float* to, Vector vector, int64_t count) {
  if (count >= kLanes) {
    store(to, vector);
  } else if (count > 0) {
    float numbers[kLanes];
    store(numbers, vector);
    std::memcpy(to, numbers, count * sizeof(float));
  }
}

// V of one source's tiles; its channels begin at chunk `at`.
template <int M, int R>
void gather_tiles(const Work& work, const Source& source, const Block& block, int64_t at, float* v, int64_t v_plane) {
  constexpr int kInputs = M + R - 1;
  const int64_t origin = work.epilogue.pool_padding + source.padding;
  const int64_t chunks = rounded_up(source.channels, kChunk) / kChunk;
  for (int64_t tile = 0; tile < block.count; ++tile) {
    const Place place = work.place(block.first + tile);
    const int64_t y = place.y * M - origin, x = place.x * M - origin;
    const float* const image = source.data + place.image * source.image + block.group * source.channels;
    const bool inside = y >= 0 && x >= 0 && y + kInputs <= source.height && x + kInputs <= source.width;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      float* const to = v + ((at + chunk) * block.rows + tile) * kChunk;
      const int64_t channels = smaller(source.channels - chunk * kChunk, kChunk);
      if (inside && channels == kChunk) {
        transform_input<M, R>(image + y * source.row + x * source.pixel + chunk * kChunk, source.row, source.pixel, to,
                              v_plane);
        continue;
      }
      float pixels[kInputs][kInputs][kChunk] = {};
      const int64_t bottom = smaller(source.height - y, kInputs);
      const int64_t right = smaller(source.width - x, kInputs);
      for (int64_t i = (y < 0 ? -y : 0); i < bottom; ++i) {
        for (int64_t j = (x < 0 ? -x : 0); j < right; ++j) {
          std::memcpy(pixels[i][j], image + (y + i) * source.row + (x + j) * source.pixel + chunk * kChunk,
                      channels * sizeof(float));
        }
      }
      transform_input<M, R>(pixels[0][0], kInputs * kChunk, kChunk, to, v_plane);
    }
  }
}

// Where a row of V is being filled, channel after channel.
struct RowWriter {
  float* to;
  int64_t chunk_stride;
  int64_t lane = 0;

  void append(const float* from, int64_t count) {  // zeros where there is nothing to read from
    while (count > 0) {
      const int64_t part = smaller(count, kChunk - lane);
      if (from != nullptr) {
        if (part == kChunk) {
          std::memcpy(to, from, kChunk * sizeof(float));
        } else {
          std::memcpy(to + lane, from, part * sizeof(float));
        }
        from += part;
      } else {
        std::memset(to + lane, 0, part * sizeof(float));
      }
      count -= part;
      lane += part;
      if (lane == kChunk) {
        lane = 0;
        to += chunk_stride;
      }
    }
  }
};

// V of one source's outputs, everything that each reads; begins at chunk `at`.
inline void gather_outputs(const Work& work, const Source& source, const Block& block, int64_t at, float* v) {
  const int64_t per_place = work.epilogue.pool ? 4 : 1;
  const int64_t taps = source.kernel * source.channels;  // neighbours in memory, where pixels are dense
  const int64_t depth = rounded_up(source.kernel * taps, kChunk);
  const bool dense = source.pixel == source.channels;
  // Rows of taps are read a few numbers too far, and written over by the next: of a fixed size that is a few moves.
  constexpr int64_t kMostTaps = 4 * kChunk;
  const bool brief = dense && taps <= kChunk && depth <= kMostTaps;
  for (int64_t index = 0; index < block.count; ++index) {
    const Place place = work.place(block.first + index);
    const float* const image = source.data + place.image * source.image + block.group * source.channels;
    for (int64_t part = 0; part < per_place; ++part) {
      float* const to = v + (at * block.rows + index * per_place + part) * kChunk;
      const int64_t out_y = work.epilogue.pool ? place.y * 2 + part / 2 - work.epilogue.pool_padding : place.y;
      const int64_t out_x = work.epilogue.pool ? place.x * 2 + part % 2 - work.epilogue.pool_padding : place.x;
      const int64_t y = out_y * work.stride - source.padding, x = out_x * work.stride - source.padding;
      const bool inside =
          y >= 0 && x >= 0 && y + source.kernel <= source.height && x + source.kernel <= source.width;
      // The row below the last one that is read exists, and with it enough numbers, so that reading too far stays in the
      // image.
      if (brief && inside && y + source.kernel < source.height && source.row + taps >= kChunk) {
        float taken[kMostTaps + kChunk] = {};
        const float* from = image + y * source.row + x * source.pixel;
        for (int64_t i = 0; i < source.kernel; ++i, from += source.row) {
          std::memcpy(taken + i * taps, from, kChunk * sizeof(float));
        }
        std::memset(taken + source.kernel * taps, 0, kChunk * sizeof(float));
        for (int64_t k = 0; k < depth; k += kChunk) {
          std::memcpy(to + k * block.rows, taken + k, kChunk * sizeof(float));
        }
        continue;
      }
      RowWriter writer{to, block.rows * kChunk};
      for (int64_t i = y; i < y + source.kernel; ++i) {
        if (inside && dense) {
          writer.append(image + i * source.row + x * source.pixel, taps);
          continue;
        }
        for (int64_t j = x; j < x + source.kernel; ++j) {
          const bool there = i >= 0 && i < source.height && j >= 0 && j < source.width;
          writer.append(there ? image + i * source.row + j * source.pixel : nullptr, source.channels);
        }
      }
      writer.append(nullptr, depth - source.kernel * taps);
    }
  }
}

// A panel's bias, one vector of it; zeros where outputs end.
struct Bias {
  float numbers[kPanel];

  Bias(const float* bias, int64_t count) : numbers() {
    if (bias != nullptr) {
      std::memcpy(numbers, bias, smaller(count, kPanel) * sizeof(float));
    }
  }
  Vector at(int64_t lane) const { return load(numbers + lane); }
};

// From a panel's products to the results, or the sums of their squares.
template <int M, int R>
void finish_tiles(const Work& work, const Block& block, int64_t panel, const float* m, int64_t m_plane, float* squares) {
  const int64_t outputs = work.outputs - panel * kPanel;  // of this panel
  const int64_t first_channel = block.group * work.outputs + panel * kPanel;
  const Epilogue& epilogue = work.epilogue;
  const Bias bias(epilogue.bias == nullptr ? nullptr : epilogue.bias + first_channel, outputs);
  const Result& result = work.result;
  const int64_t row = result.width * result.channels;
  for (int64_t tile = 0; tile < block.count; ++tile) {
    const Place place = work.place(block.first + tile);
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      Vector out[M][M];
      transform_output<M, R>(m + tile * kPanel + lane, m_plane, out);
      const Vector shift = bias.at(lane);
      if (squares != nullptr) {
        float* const sums = squares + tile * M * M * kChunk;
#pragma GCC unroll 1
        for (int i = 0; i < M * M; ++i) {
          const Vector value = out[i / M][i % M] + shift;
          store(sums + i * kChunk, load(sums + i * kChunk) + value * value);
        }
        continue;
      }
#pragma GCC unroll 1
      for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < M; ++j) {
          const Vector value = out[i][j] + shift;
          out[i][j] = epilogue.relu ? rectified(value) : value;
        }
      }
      constexpr int kStep[2] = {M, M / 2};
      const int64_t y = place.y * kStep[epilogue.pool], x = place.x * kStep[epilogue.pool];
      float* const to = result.data + (place.image * result.height + y) * row + x * result.channels + first_channel + lane;
      const int64_t high = smaller(result.height - y, kStep[epilogue.pool]);
      const int64_t wide = smaller(result.width - x, kStep[epilogue.pool]);
      const int64_t channels = outputs - lane;
      if (!epilogue.pool) {
        for (int64_t i = 0; i < high; ++i) {
          for (int64_t j = 0; j < wide; ++j) {
            store_some(to + i * row + j * result.channels, out[i][j], channels);
          }
        }
        continue;
      }
      const int64_t top = place.y * M - epilogue.pool_padding, left = place.x * M - epilogue.pool_padding;
      if (top < 0 || left < 0 || top + M > work.height || left + M > work.width) {
        for (int64_t i = 0; i < M; ++i) {
          for (int64_t j = 0; j < M; ++j) {
            if (top + i < 0 || top + i >= work.height || left + j < 0 || left + j >= work.width) {
              out[i][j] = Vector{};
            }
          }
        }
      }
      for (int64_t i = 0; i < high; ++i) {
        for (int64_t j = 0; j < wide; ++j) {
          const Vector mean = 0.25f * ((out[2 * i][2 * j] + out[2 * i][2 * j + 1]) +
                                       (out[2 * i + 1][2 * j] + out[2 * i + 1][2 * j + 1]));
          store_some(to + i * row + j * result.channels, mean, channels);
        }
      }
    }
  }
}

inline void finish_outputs(const Work& work, const Block& block, int64_t panel, const float* m, float* squares) {
  const int64_t outputs = work.outputs - panel * kPanel;
  const int64_t first_channel = block.group * work.outputs + panel * kPanel;
  const Epilogue& epilogue = work.epilogue;
  const Bias bias(epilogue.bias == nullptr ? nullptr : epilogue.bias + first_channel, outputs);
  const Result& result = work.result;
  for (int64_t index = 0; index < block.count; ++index) {
    const Place place = work.place(block.first + index);
    float* const to = result.data +
                      ((place.image * result.height + place.y) * result.width + place.x) * result.channels + first_channel;
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      const Vector shift = bias.at(lane);
      const auto value_at = [&](int64_t row) {
        const Vector value = load(m + row * kPanel + lane) + shift;
        return epilogue.relu ? rectified(value) : value;
      };
      if (squares != nullptr) {
        float* const sums = squares + index * kChunk;
        const Vector value = value_at(index);
        store(sums, load(sums) + value * value);
      } else if (!epilogue.pool) {
        store_some(to + lane, value_at(index), outputs - lane);
      } else {
        Vector sum{};
        for (int64_t part = 0; part < 4; ++part) {
          const int64_t y = place.y * 2 + part / 2 - epilogue.pool_padding;
          const int64_t x = place.x * 2 + part % 2 - epilogue.pool_padding;
          if (y >= 0 && y < work.height && x >= 0 && x < work.width) {
            sum += value_at(4 * index + part);
          }
        }
        store_some(to + lane, 0.25f * sum, outputs - lane);
      }
    }
  }
}

// Means of squares, once all panels are in.
inline void finish_squares(const Work& work, const Block& block, const float* squares) {
  const int64_t side = work.tile;
  for (int64_t tile = 0; tile < block.count; ++tile) {
    const Place place = work.place(block.first + tile);
    for (int64_t i = 0; i < side * side; ++i, squares += kChunk) {
      const int64_t y = place.y * side + i / side, x = place.x * side + i % side;
      if (y >= work.result.height || x >= work.result.width) {
        continue;
      }
      float sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        sum += squares[lane];
      }
      work.result.data[(place.image * work.result.height + y) * work.result.width + x] = sum * work.scale;
    }
  }
}

template <int M, int R>
void run_filtered(const Work& work, const Block& block, float* room) {
  const int64_t chunks = work.packed.depth / kChunk, planes = work.packed.planes;
  // An odd number of cache lines from plane to plane, or all of them would fall into a few sets of the cache.
  const int64_t v_plane = (chunks * block.rows | 1) * kChunk;
  const int64_t m_plane = (block.rows * 2 + 1) * kChunk;
  float* const v = room;
  float* const m = v + planes * v_plane;
  float* const squares = work.squares ? m + planes * m_plane : nullptr;
  if (work.squares) {
    std::memset(squares, 0, block.count * work.tile * work.tile * kChunk * sizeof(float));
  }
  int64_t at = 0;
  for (const Source& source : work.sources) {
    if (source.data != nullptr) {
      if constexpr (M == 1) {
        gather_outputs(work, source, block, at, v);
        at += rounded_up(source.kernel * source.kernel * source.channels, kChunk) / kChunk;
      } else {
        gather_tiles<M, R>(work, source, block, at, v, v_plane);
        at += rounded_up(source.channels, kChunk) / kChunk;
      }
    }
  }
  // An image's three channels leave most of their only chunk empty.
  const bool few = M != 1 && chunks == 1 && work.sources[0].channels <= kFewChannels;
  const int64_t plane_numbers = work.packed.depth * kPanel;
  for (int64_t panel = 0; panel < work.packed.panels; ++panel) {
    const float* const u =
        work.packed.data + (block.group * work.packed.panels + panel) * planes * plane_numbers;
    for (int64_t plane = 0; plane < planes; ++plane) {
      const auto multiplied = few ? multiply<kFewChannels> : multiply<kChunk>;
      multiplied(v + plane * v_plane, block.rows, u + plane * plane_numbers, chunks, m + plane * m_plane);
    }
    if constexpr (M == 1) {
      finish_outputs(work, block, panel, m, squares);
    } else {
      finish_tiles<M, R>(work, block, panel, m, m_plane, squares);
    }
  }
  if (work.squares) {
    finish_squares(work, block, squares);
  }
}

inline void run(const Work& work, const Block& block, float* room) {
  if (work.tile == 1) {
    run_filtered<1, 1>(work, block, room);
  } else if (work.tile == 4) {
    work.filter == 3 ? run_filtered<4, 3>(work, block, room) : run_filtered<4, 4>(work, block, room);
  } else {
    work.filter == 3 ? run_filtered<6, 3>(work, block, room) : run_filtered<6, 4>(work, block, room);
  }
}

// One row of a resized image: `upper` and `lower` are the rows it lies between.
inline void resize_row(const float* __restrict__ upper, const float* __restrict__ lower, float down, int64_t channels,
                       const int64_t* __restrict__ left, const int64_t* __restrict__ right,
                       const float* __restrict__ along, int64_t width, float* __restrict__ to) {
  for (int64_t x = 0; x < width; ++x, to += channels) {
    const float* const corners[4] = {upper + left[x] * channels, upper + right[x] * channels,
                                     lower + left[x] * channels, lower + right[x] * channels};
    const float weights[4] = {(1 - down) * (1 - along[x]), (1 - down) * along[x], down * (1 - along[x]),
                              down * along[x]};
    int64_t channel = 0;
    for (; channel + kLanes <= channels; channel += kLanes) {
      store(to + channel, (weights[0] * load(corners[0] + channel) + weights[1] * load(corners[1] + channel)) +
                              (weights[2] * load(corners[2] + channel) + weights[3] * load(corners[3] + channel)));
    }
    for (; channel < channels; ++channel) {
      to[channel] = (weights[0] * corners[0][channel] + weights[1] * corners[1][channel]) +
                    (weights[2] * corners[2][channel] + weights[3] * corners[3][channel]);
    }
  }
}
