// Rows of the anomaly map. Included by for_each_level.h.

// out[x] = row[left[x]] + weight[x] * (row[left[x] + step[x]] - row[left[x]]), over a row of `width` outputs.
template <typename T>
void expand_row(const T* __restrict__ row, const int32_t* __restrict__ left, const int32_t* __restrict__ right,
                const T* __restrict__ weight, int64_t width, T* __restrict__ out) {
  for (int64_t x = 0; x < width; ++x) {
    out[x] = (T{1} - weight[x]) * row[left[x]] + weight[x] * row[right[x]];
  }
}

// out = (1 - weight) * upper + weight * lower + offset; returns the largest element, NaN where there is one.
template <typename T>
T blend_rows(const T* __restrict__ upper, const T* __restrict__ lower, T weight, T offset, int64_t width,
             T* __restrict__ out) {
  constexpr int kLanes = 16;  // independent maxima, which compilers turn into vectors without -ffast-math
  T largest[kLanes];
  int32_t unordered[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    largest[lane] = -std::numeric_limits<T>::infinity();
    unordered[lane] = 0;
  }
  const T kept = T{1} - weight;
  int64_t x = 0;
  for (; x + kLanes <= width; x += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const T value = kept * upper[x + lane] + weight * lower[x + lane] + offset;
      out[x + lane] = value;
      largest[lane] = value > largest[lane] ? value : largest[lane];
      unordered[lane] |= value != value;
    }
  }
  for (; x < width; ++x) {
    const T value = kept * upper[x] + weight * lower[x] + offset;
    out[x] = value;
    largest[0] = value > largest[0] ? value : largest[0];
    unordered[0] |= value != value;
  }
  for (int lane = 1; lane < kLanes; ++lane) {
    largest[0] = largest[lane] > largest[0] ? largest[lane] : largest[0];
    unordered[0] |= unordered[lane];
  }
  return unordered[0] ? std::numeric_limits<T>::quiet_NaN() : largest[0];
}

// combined = a * st + b * ae + offset, over contiguous elements.
template <typename T>
void combine_row(const T* __restrict__ st, const T* __restrict__ ae, T a, T b, T offset, int64_t count,
                 T* __restrict__ combined) {
  for (int64_t i = 0; i < count; ++i) {
    combined[i] = a * st[i] + b * ae[i] + offset;
  }
}
