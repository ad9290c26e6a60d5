// Histograms of numbers. Included by for_each_level.h.

// The 32 bits of each number as an integer of the same order; NaN as the largest.
inline void keys_of(const float* __restrict__ values, int64_t count, uint32_t* __restrict__ keys) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    const uint32_t flipped = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
    keys[i] = values[i] != values[i] ? 0xffffffffu : flipped;
  }
}

// counts[upper 16 bits] += 1 for each of `count` numbers.
inline void count_upper(const float* values, int64_t count, int64_t* __restrict__ counts) {
  uint32_t keys[kBlock];
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t block = count - first < kBlock ? count - first : kBlock;
    keys_of(values + first, block, keys);
    for (int64_t i = 0; i < block; ++i) {
      ++counts[keys[i] >> 16];
    }
  }
}

// counts[row][lower 16 bits] += 1 for each whose upper 16 bits are prefixes[row].
inline void count_lower(const float* values, int64_t count, const uint32_t* prefixes, int64_t rows,
                        int64_t* __restrict__ counts) {
  uint32_t keys[kBlock];
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t block = count - first < kBlock ? count - first : kBlock;
    keys_of(values + first, block, keys);
    for (int64_t row = 0; row < rows; ++row) {
      const uint32_t prefix = prefixes[row];
      uint32_t any = 0;
      for (int64_t i = 0; i < block; ++i) {
        any |= keys[i] >> 16 == prefix;
      }
      if (any) {  // most blocks have none
        for (int64_t i = 0; i < block; ++i) {
          if (keys[i] >> 16 == prefix) {
            ++counts[row * quantile::kBuckets + (keys[i] & 0xffff)];
          }
        }
      }
    }
  }
}
