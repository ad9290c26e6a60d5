// Squared differences and their gradient. Included by for_each_level.h.

inline void squared_differences(const float* __restrict__ teacher, const float* __restrict__ student, int64_t count,
                                float* __restrict__ squared) {
  for (int64_t i = 0; i < count; ++i) {
    const float difference = student[i] - teacher[i];
    squared[i] = difference * difference;
  }
}

// Adds those of `count` numbers that reach the threshold, and how many they are.
inline void add_selected(const float* __restrict__ squared, int64_t count, float threshold, Selected* selected) {
  constexpr int64_t kLanes = 16;
  constexpr int64_t kGroup = 4 * kLanes;
  double sums[kLanes] = {};
  int64_t numbers = 0, first = 0;
  for (; first + kGroup <= count; first += kGroup) {
    int reached = 0;
    for (int64_t i = 0; i < kGroup; ++i) {
      reached += squared[first + i] >= threshold;
    }
    numbers += reached;
    if (reached) {  // most groups have none
      for (int64_t row = first; row < first + kGroup; row += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          sums[lane] += squared[row + lane] >= threshold ? squared[row + lane] : 0.0f;
        }
      }
    }
  }
  for (; first < count; ++first) {
    if (squared[first] >= threshold) {
      sums[0] += squared[first];
      ++numbers;
    }
  }
  for (const double sum : sums) {
    selected->sum += sum;
  }
  selected->count += numbers;
}

// `factor` is the gradient with respect to a selected square. A difference that is not finite makes NaN of zero.
inline void gradient_of_squares(const float* __restrict__ teacher, const float* __restrict__ student, int64_t count,
                                float threshold, float factor, float* __restrict__ gradient) {
  for (int64_t i = 0; i < count; ++i) {
    const float difference = student[i] - teacher[i];
    gradient[i] = (difference * difference >= threshold ? factor : 0.0f) * (2.0f * difference);
  }
}
