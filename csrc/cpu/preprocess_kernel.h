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
                        int64_t count, int32_t* __restrict__ sum, uint8_t* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    sum[i] = 1 << 21;
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    const uint8_t* __restrict__ row = rows[tap];
    const int32_t weight = weights[tap];
    for (int64_t i = 0; i < count; ++i) {
      sum[i] += weight * row[i];
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int32_t level = sum[i] >> 22;
    out[i] = static_cast<uint8_t>(level < 0 ? 0 : level > 255 ? 255 : level);
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

// The same in 8 bits, as blend_bytes.
inline void blend_byte_pixels(const uint8_t* __restrict__ row, const int64_t* __restrict__ first,
                              const int32_t* __restrict__ taps, const int32_t* __restrict__ weights, int64_t stride,
                              int64_t width, uint8_t* __restrict__ out) {
  for (int64_t x = 0; x < width; ++x) {
    const uint8_t* from = row + 3 * first[x];
    const int32_t* weight = weights + x * stride;
    int32_t red = 1 << 21, green = 1 << 21, blue = 1 << 21;
    for (int32_t tap = 0; tap < taps[x]; ++tap) {
      red += weight[tap] * from[3 * tap];
      green += weight[tap] * from[3 * tap + 1];
      blue += weight[tap] * from[3 * tap + 2];
    }
    const int32_t levels[3] = {red >> 22, green >> 22, blue >> 22};
    for (int channel = 0; channel < 3; ++channel) {
      const int32_t level = levels[channel];
      out[3 * x + channel] = static_cast<uint8_t>(level < 0 ? 0 : level > 255 ? 255 : level);
    }
  }
}
