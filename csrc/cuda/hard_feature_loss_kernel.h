// hard_feature_loss on a GPU: device code and launches, without framework types.
// efficientad_fast/ops/hard_feature_loss.py is the contract.
//
// The quantile's three passes count digits of squares that each makes of both tensors; the last block to come finds the
// digit. What the last digit counts are single numbers, of which the sum is known then, so that the third pass has to
// add those alone that are larger than all it counts.

#pragma once

#include "device.h"
#include "numbers.h"
#include "selection.h"

#include <algorithm>
#include <cstdint>
#include <limits>

namespace efficientad_fast::cuda {

inline constexpr int kLossThreads = 256;
inline constexpr int kLossWarps = kLossThreads / 32;
inline constexpr int64_t kLossChunks = 2;  // of a thread, where there are few
inline constexpr int64_t kLossMaxBlocks = 1024;
inline constexpr int kLowSlot = 0, kHighSlot = 1;  // the two ranks that the fraction lies between
inline constexpr int kLossSlots = 2;
inline constexpr int kFeatureAxes = 4;

// Both tensors as rows of numbers that are next to each other.
struct FeaturePair {
  const void *teacher, *student;
  Dtype teacher_dtype, student_dtype;
  int64_t rows, columns, teacher_stride, student_stride;  // in elements, from row to row
};

struct LossWorkspace {
  Selection<kLossSlots> selection;
  unsigned long long arrived[kDigits];  // blocks that have counted
  double sums[kLossMaxBlocks];          // of each block, of squares larger than all that the third pass counts
};

struct HardFeatureLoss {
  FeaturePair features;
  double fraction;
  float *loss, *threshold;
  int64_t* count;
  LossWorkspace* workspace;
};

struct LossGradient {
  FeaturePair features;
  const float *threshold, *grad_loss;
  const int64_t* count;
  void* gradient;  // contiguous, in the order of the features and with the student's dtype
};

// What a thread takes at once of a row: whole vectors of both.
template <typename Teacher, typename Student>
inline constexpr int kFeatureChunk = std::max(Vector<Teacher>::kCount, Vector<Student>::kCount);

// How a launch goes through features: from one of a thread's chunks to its next, and whether whole ones are vectors.
struct FeatureWalk {
  int64_t row_chunks;
  int64_t row_step, chunk_step;
  bool wide;
};

// kCount elements, the last of which may be beyond a row.
template <typename Element, int kCount>
struct FeatureChunk {
  using Elements = Vector<Element>;
  Elements vectors[kCount / Elements::kCount];

  __device__ __forceinline__ Element& operator[](int i) {
    return vectors[i / Elements::kCount].element[i % Elements::kCount];
  }

  __device__ __forceinline__ void load(const Element* from) {
#pragma unroll
    for (int i = 0; i < kCount / Elements::kCount; ++i) {
      vectors[i] = reinterpret_cast<const Elements*>(from)[i];
    }
  }

  __device__ __forceinline__ void store(Element* to) const {
#pragma unroll
    for (int i = 0; i < kCount / Elements::kCount; ++i) {
      reinterpret_cast<Elements*>(to)[i] = vectors[i];
    }
  }
};

// Calls body(differences, taken, at) for every chunk, spread over the threads of all blocks: student - teacher of as
// many numbers as are taken, the first of which is number `at` of all.
template <typename Teacher, typename Student, typename Body>
__device__ __forceinline__ void for_each_difference(const FeaturePair& p, const FeatureWalk& walk, const Body& body) {
  constexpr int kCount = kFeatureChunk<Teacher, Student>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kLossThreads + threadIdx.x;
  int64_t row = first / walk.row_chunks, chunk = first % walk.row_chunks;
  while (row < p.rows) {
    const int64_t column = chunk * kCount;
    const Teacher* const of_teacher = static_cast<const Teacher*>(p.teacher) + row * p.teacher_stride + column;
    const Student* const of_student = static_cast<const Student*>(p.student) + row * p.student_stride + column;
    const int taken = static_cast<int>(min(p.columns - column, static_cast<int64_t>(kCount)));
    FeatureChunk<Teacher, kCount> teacher;
    FeatureChunk<Student, kCount> student;
    if (walk.wide && taken == kCount) {
      teacher.load(of_teacher);
      student.load(of_student);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        teacher[i] = i < taken ? of_teacher[i] : to_element<Teacher>(0.0f);
        student[i] = i < taken ? of_student[i] : to_element<Student>(0.0f);
      }
    }
    float differences[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      differences[i] = to_number<float>(student[i]) - to_number<float>(teacher[i]);
    }
    body(differences, taken, row * p.columns + column);
    row += walk.row_step, chunk += walk.chunk_step;
    if (chunk >= walk.row_chunks) {
      chunk -= walk.row_chunks;
      ++row;
    }
  }
}

// The sum over the block's threads, of warps in their order. Between two calls there must be a barrier.
__device__ __forceinline__ double loss_block_sum(double mine) {
  __shared__ double of_warp[kLossWarps];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    mine += __shfl_xor_sync(0xffffffffu, mine, distance);
  }
  if (threadIdx.x % 32 == 0) {
    of_warp[threadIdx.x / 32] = mine;
  }
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int warp = 0; warp < kLossWarps; ++warp) {
    sum += of_warp[warp];
  }
  return sum;
}

// Whether all other blocks were here: what they wrote before is there then. Every thread of the block comes here.
__device__ __forceinline__ bool is_last_loss_block(unsigned long long* arrived) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(arrived, 1ull) == gridDim.x - 1;
  }
  __syncthreads();
  __threadfence();
  return last;
}

__global__ void __launch_bounds__(kLossThreads) reset_loss(const HardFeatureLoss p) {
  LossWorkspace& workspace = *p.workspace;
  const int first = blockIdx.x * kLossThreads + threadIdx.x;
  reset_counts(workspace.selection, first, gridDim.x * kLossThreads);
  if (first < kDigits) {
    workspace.arrived[first] = 0;
  }
  if (first < kLossSlots) {
    const int64_t count = p.features.rows * p.features.columns;
    const int64_t rank = min(Position(p.fraction, count).low + (first == kHighSlot), count - 1);
    workspace.selection.rank[first] = static_cast<unsigned long long>(rank);
  }
}

// Threshold, loss and count, once both keys are found. No number lies between the two: those that reach the threshold
// are those from the upper one on, with those that equal the lower one where that is the threshold.
__device__ __forceinline__ void finish_loss(const HardFeatureLoss& p, const unsigned (&keys)[kLossSlots]) {
  const LossWorkspace& workspace = *p.workspace;
  const Selection<kLossSlots>& selection = workspace.selection;
  constexpr int kLast = kDigits - 1;
  constexpr unsigned kLastBins = 1u << kDigitBits<kLast>;
  unsigned prefix[kLossSlots];
  load_prefixes<kLast>(selection, prefix);
  const unsigned long long* const counts = selection.counts[kLast][owner_of(prefix, kHighSlot)];
  double mine = 0;
  for (unsigned bin = keys[kHighSlot] % kLastBins + threadIdx.x; bin < kLastBins; bin += kLossThreads) {
    if (counts[bin] > 0) {  // zero times infinity
      mine += static_cast<double>(counts[bin]) * number_of(prefix[kHighSlot] << kDigitBits<kLast> | bin);
    }
  }
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kLossThreads) {
    mine += workspace.sums[block];
  }
  double sum = loss_block_sum(mine);
  if (threadIdx.x != 0) {
    return;
  }
  const int64_t all = p.features.rows * p.features.columns;
  const Position position(p.fraction, all);
  // The rank that is left is one among equal numbers.
  const int64_t from_low = all - position.low + static_cast<int64_t>(selection.rank[kLowSlot]);
  const int64_t from_high = all - min(position.low + 1, all - 1) + static_cast<int64_t>(selection.rank[kHighSlot]);
  const double low = number_of(keys[kLowSlot]);
  float threshold = __double2float_rn(interpolate(low, number_of(keys[kHighSlot]), position.along));
  if (selection.counts[0][0][kNanBin] > 0) {
    threshold = std::numeric_limits<float>::quiet_NaN();
  }
  int64_t count = from_high;
  if (threshold != threshold) {
    count = 0;
  } else if (threshold == low && from_low > from_high) {
    count = from_low;
    sum += static_cast<double>(from_low - from_high) * low;
  }
  *p.threshold = threshold;
  *p.count = count;
  *p.loss = count > 0 ? __double2float_rn(sum / static_cast<double>(count)) : std::numeric_limits<float>::quiet_NaN();
}

template <int kDigit, typename Teacher, typename Student>
__global__ void __launch_bounds__(kLossThreads) count_digits_of_squares(const HardFeatureLoss p,
                                                                          const FeatureWalk walk) {
  constexpr bool kLast = kDigit == kDigits - 1;
  using Counts = DigitCounts<kDigit, kLossThreads, kLossSlots>;
  __shared__ unsigned shared[Counts::kNumbers];
  __shared__ unsigned keys[kLossSlots];
  LossWorkspace& workspace = *p.workspace;
  const Counts counts(workspace.selection, shared);
  double sum = 0;
  for_each_difference<Teacher, Student>(p.features, walk, [&](const auto& differences, int taken, int64_t) {
#pragma unroll
    for (int i = 0; i < kFeatureChunk<Teacher, Student>; ++i) {
      const float squared = differences[i] * differences[i];
      const unsigned key = key_of(squared);
      if (i < taken) {
        counts.count(key);
        if constexpr (kLast) {
          if (counts.is_above(key, kHighSlot)) {
            sum += squared;
          }
        }
      }
    }
  });
  counts.add_to(workspace.selection);
  if constexpr (kLast) {
    sum = loss_block_sum(sum);
    if (threadIdx.x == 0) {
      workspace.sums[blockIdx.x] = sum;
    }
  }
  if (!is_last_loss_block(&workspace.arrived[kDigit])) {
    return;
  }
  select_digit<kDigit, kLossThreads>(workspace.selection, keys);
  if constexpr (kLast) {
    __syncthreads();
    finish_loss(p, keys);
  }
}

template <typename Teacher, typename Student>
__global__ void __launch_bounds__(kLossThreads) gradient_of_squares(const LossGradient p, const FeatureWalk walk) {
  constexpr int kCount = kFeatureChunk<Teacher, Student>;
  const float threshold = *p.threshold;
  const float factor = *p.grad_loss / static_cast<float>(*p.count);  // none is selected where that is no number
  Student* const gradient = static_cast<Student*>(p.gradient);
  for_each_difference<Teacher, Student>(p.features, walk, [&](const auto& differences, int taken, int64_t at) {
    FeatureChunk<Student, kCount> result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      // A difference that is not finite makes NaN of zero, as the contract says.
      const bool selected = differences[i] * differences[i] >= threshold;
      result[i] = to_element<Student>((selected ? factor : 0.0f) * (2.0f * differences[i]));
    }
    if (walk.wide && taken == kCount) {
      result.store(gradient + at);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i < taken) {
          gradient[at + i] = result[i];
        }
      }
    }
  });
}

// Whether features of the given sizes and strides have rows in common, which are put into `features` then. Axes of both
// that go on in each other are one.
inline bool find_common_rows(const int64_t (&sizes)[kFeatureAxes], const int64_t (&teacher_strides)[kFeatureAxes],
                      const int64_t (&student_strides)[kFeatureAxes], FeaturePair* features) {
  struct Axis {
    int64_t size, teacher_stride, student_stride;
  };
  Axis merged[kFeatureAxes + 1];
  int count = 0;  // from the innermost
  for (int axis = kFeatureAxes - 1; axis >= 0; --axis) {
    const Axis next{sizes[axis], teacher_strides[axis], student_strides[axis]};
    if (next.size == 1) {
      continue;
    }
    Axis& inner = merged[std::max(count - 1, 0)];
    if (count > 0 && next.teacher_stride == inner.size * inner.teacher_stride &&
        next.student_stride == inner.size * inner.student_stride) {
      inner.size *= next.size;
    } else {
      merged[count++] = next;
    }
  }
  const bool next_to_each_other = count > 0 && merged[0].teacher_stride == 1 && merged[0].student_stride == 1;
  const int outer = next_to_each_other ? 1 : 0;  // rows of one number, where they are not
  if (count > outer + 1) {
    return false;
  }
  const Axis rows = count > outer ? merged[outer] : Axis{1, 0, 0};
  features->columns = next_to_each_other ? merged[0].size : 1;
  features->rows = rows.size;
  features->teacher_stride = rows.teacher_stride, features->student_stride = rows.student_stride;
  return true;
}

// Calls start(teacher, student, blocks, walk) with values of both elements' types.
template <typename Start>
void with_feature_pair(const FeaturePair& features, int64_t chunks_of_thread, const Start& start) {
  const auto with_dtype = [](Dtype dtype, const auto& body) {
    switch (dtype) {
      case Dtype::kFloat16: return body(__half{});
      case Dtype::kBFloat16: return body(__nv_bfloat16{});
      default: return body(float{});
    }
  };
  with_dtype(features.teacher_dtype, [&](auto teacher) {
    with_dtype(features.student_dtype, [&](auto student) {
      using Teacher = decltype(teacher);
      using Student = decltype(student);
      FeatureWalk walk{};
      walk.row_chunks = (features.columns - 1) / kFeatureChunk<Teacher, Student> + 1;
      const int64_t chunks = features.rows * walk.row_chunks, of_block = kLossThreads * chunks_of_thread;
      const int64_t blocks = std::min((chunks - 1) / of_block + 1, kLossMaxBlocks);
      const int64_t step = blocks * kLossThreads;
      walk.row_step = step / walk.row_chunks, walk.chunk_step = step % walk.row_chunks;
      const bool rows_aligned = features.teacher_stride % Vector<Teacher>::kCount == 0 &&
                                features.student_stride % Vector<Student>::kCount == 0;
      walk.wide = is_aligned(features.teacher) && is_aligned(features.student) && (features.rows == 1 || rows_aligned);
      start(teacher, student, dim3(static_cast<unsigned>(blocks)), walk);
    });
  });
}

inline void launch_hard_feature_loss(const HardFeatureLoss& call, cudaStream_t stream) {
  const dim3 threads(kLossThreads);
  const dim3 reset_blocks(kDigits * kLossSlots * kBins / (4 * kLossThreads));
  launch(reset_loss, reset_blocks, threads, 0, stream, call);
  with_feature_pair(call.features, kLossChunks, [&](auto teacher, auto student, dim3 blocks, const FeatureWalk& walk) {
    using Teacher = decltype(teacher);
    using Student = decltype(student);
    launch(count_digits_of_squares<0, Teacher, Student>, blocks, threads, 0, stream, call, walk);
    launch(count_digits_of_squares<1, Teacher, Student>, blocks, threads, 0, stream, call, walk);
    launch(count_digits_of_squares<2, Teacher, Student>, blocks, threads, 0, stream, call, walk);
  });
}

inline void launch_loss_gradient(const LossGradient& call, cudaStream_t stream) {
  with_feature_pair(call.features, 1, [&](auto teacher, auto student, dim3 blocks, FeatureWalk walk) {
    using Teacher = decltype(teacher);
    using Student = decltype(student);
    const bool rows_aligned = call.features.columns % Vector<Student>::kCount == 0;
    walk.wide = walk.wide && is_aligned(call.gradient) && (call.features.rows == 1 || rows_aligned);
    launch(gradient_of_squares<Teacher, Student>, blocks, dim3(kLossThreads), 0, stream, call, walk);
  });
}

}  // namespace efficientad_fast::cuda
