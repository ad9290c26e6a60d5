// Rows and pixels of preprocess. Included by for_each_level.h. Images are HWC: a row is `count` = 3 * width numbers.

// sum[i] = sum over taps of weights[tap] * top[tap * count + i]
template <typename T>
void blend_rows(const T* __restrict__ top, const float* __restrict__ weights, int32_t taps, int64_t count,
                float* __restrict__ sum) {
  constexpr int kBlock = 64;  // sums that stay in registers over all taps
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    float block[kBlock] = {};
    for (int32_t tap = 0; tap < taps; ++tap) {
      const T* __restrict__ row = top + tap * count + i;
      const float weight = weights[tap];
      for (int j = 0; j < kBlock; ++j) {
        block[j] += weight * static_cast<float>(row[j]);
      }
    }
    std::memcpy(sum + i, block, sizeof(block));
  }
  for (; i < count; ++i) {
    sum[i] = 0;
    for (int32_t tap = 0; tap < taps; ++tap) {
      sum[i] += weights[tap] * static_cast<float>(top[tap * count + i]);
    }
  }
}

// out[i] = (sum over taps of rows[tap][i] * weights[tap] + a half) in units of 2^-22, to 8 bits.
inline void blend_bytes(const uint8_t* const* __restrict__ rows, const int32_t* __restrict__ weights, int64_t taps,
                        int64_t count, uint8_t* __restrict__ out) {
  constexpr int kBlock = 64;
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t block = count - i < kBlock ? count - i : kBlock;
    int32_t sum[kBlock];
    for (int j = 0; j < kBlock; ++j) {
      sum[j] = 1 << 21;
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t* __restrict__ row = rows[tap] + i;
      const int32_t weight = weights[tap];
      if (block == kBlock) {
        for (int j = 0; j < kBlock; ++j) {
          sum[j] += weight * row[j];
        }
      } else {
        for (int64_t j = 0; j < block; ++j) {
          sum[j] += weight * row[j];
        }
      }
    }
    for (int64_t j = 0; j < block; ++j) {
      const int32_t level = sum[j] >> 22;
      out[i + j] = static_cast<uint8_t>(level < 0 ? 0 : level > 255 ? 255 : level);
    }
  }
}

typedef float Pixel __attribute__((vector_size(16)));  // three channels and one number that is not used

// out pixel x = scale * (sum over taps of row pixel) + shift; `row` and `out` have one number behind their last pixel.
inline void blend_pixels(const float* __restrict__ row, const int64_t* __restrict__ first, const int32_t* __restrict__ taps,
                         const float* __restrict__ weights, int64_t stride, int64_t width, const float* scale,
                         const float* shift, float* __restrict__ out) {
  Pixel scales, shifts;
  std::memcpy(&scales, scale, sizeof(Pixel));
  std::memcpy(&shifts, shift, sizeof(Pixel));
  for (int64_t x = 0; x < width; ++x) {
    const float* from = row + 3 * first[x];
    const float* weight = weights + x * stride;
    Pixel sum = {};
    for (int32_t tap = 0; tap < taps[x]; ++tap) {
      Pixel pixel;
      std::memcpy(&pixel, from + 3 * tap, sizeof(Pixel));
      sum += pixel * weight[tap];
    }
    sum = sum * scales + shifts;
    std::memcpy(out + 3 * x, &sum, sizeof(Pixel));
  }
}

typedef uint8_t Bytes __attribute__((vector_size(kTogether)));

// A step of a transposition: deals the first half of `vectors` out between the second one.
inline void deal(const Bytes* __restrict__ vectors, Bytes* __restrict__ dealt) {
  for (int i = 0; i < kTogether / 2; ++i) {
    const Bytes first = vectors[i], second = vectors[i + kTogether / 2];
    dealt[2 * i] = __builtin_shufflevector(first, second, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    dealt[2 * i + 1] =
        __builtin_shufflevector(first, second, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// Transposes 16 vectors, in place.
inline void transpose(Bytes* __restrict__ vectors) {
  Bytes dealt[kTogether];
  deal(vectors, dealt);
  deal(dealt, vectors);
  deal(vectors, dealt);
  deal(dealt, vectors);
}

// A pixel of 16 rows: out = sum over taps of weights[tap] * from, three channels of 16 levels each, to 8 bits, which
// lie `plane` apart in `out`. Weights are not negative. By itself, and with three arrays, for compilers keep these in registers so, and not where it is inlined.
__attribute__((noinline)) inline void blend_levels(const uint8_t* __restrict__ from, const int32_t* __restrict__ weights,
                                                   int32_t taps, uint8_t* __restrict__ out, int64_t plane) {
  int32_t red[kTogether], green[kTogether], blue[kTogether];
  for (int row = 0; row < kTogether; ++row) {
    red[row] = green[row] = blue[row] = 1 << 21;
  }
  for (int32_t tap = 0; tap < taps; ++tap) {
    const int32_t weight = weights[tap];
    const uint8_t* levels = from + 3 * kTogether * static_cast<int64_t>(tap);
    for (int row = 0; row < kTogether; ++row) {
      red[row] += weight * levels[row];
    }
    for (int row = 0; row < kTogether; ++row) {
      green[row] += weight * levels[kTogether + row];
    }
    for (int row = 0; row < kTogether; ++row) {
      blue[row] += weight * levels[2 * kTogether + row];
    }
  }
  for (int row = 0; row < kTogether; ++row) {
    out[row] = static_cast<uint8_t>(red[row] >> 22 > 255 ? 255 : red[row] >> 22);
  }
  for (int row = 0; row < kTogether; ++row) {
    out[plane + row] = static_cast<uint8_t>(green[row] >> 22 > 255 ? 255 : green[row] >> 22);
  }
  for (int row = 0; row < kTogether; ++row) {
    out[2 * plane + row] = static_cast<uint8_t>(blue[row] >> 22 > 255 ? 255 : blue[row] >> 22);
  }
}

// The same in 8 bits, as blend_bytes, for 16 rows at once: a tap has one weight for all of them. `turned` has room for
// 3 * length vectors and `result` for those of 3 * width; rows of `out` are `out_stride` apart, a multiple of 16, and hold
// one channel after the other, so that what follows runs over neighbours.
inline void blend_byte_pixels(const uint8_t* const* rows, int64_t length, const int64_t* __restrict__ first,
                              const int32_t* __restrict__ taps, const int32_t* __restrict__ weights, int64_t stride,
                              int64_t width, uint8_t* turned, uint8_t* result, uint8_t* out, int64_t out_stride) {
  Bytes vectors[kTogether];
  const int64_t count = 3 * length, out_count = 3 * width;
  int64_t column = 0;
  for (; column + kTogether <= count; column += kTogether) {
    for (int row = 0; row < kTogether; ++row) {
      std::memcpy(&vectors[row], rows[row] + column, kTogether);
    }
    transpose(vectors);
    for (int i = 0; i < kTogether; ++i) {  // one by one: a wider load would wait for what was stored in parts
      std::memcpy(turned + (column + i) * kTogether, &vectors[i], kTogether);
    }
  }
  for (; column < count; ++column) {
    for (int row = 0; row < kTogether; ++row) {
      turned[column * kTogether + row] = rows[row][column];
    }
  }
  for (int64_t x = 0; x < width; ++x) {
    const uint8_t* __restrict__ from = turned + 3 * first[x] * kTogether;
    const int32_t* weight = weights + x * stride;
    blend_levels(from, weight, taps[x], result + x * kTogether, width * kTogether);
  }
  for (column = 0; column < out_count; column += kTogether) {  // `result` and `out` have room for whole vectors
    for (int i = 0; i < kTogether; ++i) {
      std::memcpy(&vectors[i], result + (column + i) * kTogether, kTogether);
    }
    transpose(vectors);
    for (int row = 0; row < kTogether; ++row) {
      std::memcpy(out + row * out_stride + column, &vectors[row], kTogether);
    }
  }
}

// out = scale * levels + shift, over contiguous elements.
inline void scale_levels(const uint8_t* __restrict__ levels, int64_t count, float scale, float shift,
                         float* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = scale * static_cast<float>(levels[i]) + shift;
  }
}
