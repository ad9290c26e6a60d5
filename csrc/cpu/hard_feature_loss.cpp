// hard_feature_loss on the CPU: the quantile's two passes over squares that are made of both tensors each time, then
// one that adds those that reach it. Blocks are added in their order, whatever thread had them.

#include "hard_feature_loss.h"

#include "level.h"
#include "numbers.h"
#include "quantile_source.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

namespace efficientad_fast {

namespace {

struct Selected {
  double sum = 0;
  int64_t count = 0;
};

#define EFFICIENTAD_FAST_KERNEL "hard_feature_loss_kernel.h"
#include "for_each_level.h"

constexpr int64_t kBlock = quantile::kSourceBlock;
constexpr int64_t kGrain = 8;  // blocks per thread below which threads cost more than they save
constexpr int kAxes = 4;

int64_t blocks_of(int64_t numbers) {
  return (numbers - 1) / kBlock + 1;
}

// Both tensors in the order in which the gradient lies in memory, in runs in which neither has an index to be computed.
class Pairs {
 public:
  Pairs(const Tensor& teacher, const Tensor& student)
      : numbers_(teacher.numel()), sides_{Side(teacher), Side(student)} {
    const auto order = hard_feature_loss::has_channels_innermost(student) ? std::array{0, 2, 3, 1} : std::array{0, 1, 2, 3};
    sizes_.fill(1);
    int axis = kAxes;  // the outermost so far of the merged ones, which are filled from the innermost
    for (int given = kAxes - 1; given >= 0; --given) {
      const int64_t size = teacher.size(order[given]);
      const int64_t strides[2] = {teacher.stride(order[given]), student.stride(order[given])};
      if (size == 1) {
        continue;
      }
      const auto goes_on = [&](int side) { return strides[side] == sizes_[axis] * sides_[side].strides[axis]; };
      if (axis < kAxes && goes_on(0) && goes_on(1)) {
        sizes_[axis] *= size;
        continue;
      }
      sizes_[--axis] = size;
      for (int side = 0; side < 2; ++side) {
        sides_[side].strides[axis] = strides[side];
      }
    }
  }

  int64_t numbers() const { return numbers_; }

  // body(teacher, student, at, count) for runs of `count` numbers, which are those from first + at on.
  template <typename Body>
  void for_each_run(int64_t first, int64_t count, const Body& body) const {
    float rooms[2][kBlock];
    std::array<int64_t, kAxes> index;
    int64_t rest = first;
    for (int axis = kAxes - 1; axis >= 0; --axis) {
      index[axis] = rest % sizes_[axis];
      rest /= sizes_[axis];
    }
    for (int64_t at = 0; at < count;) {
      const int64_t run = std::min({sizes_.back() - index.back(), count - at, kBlock});
      body(sides_[0].floats(index, run, rooms[0]), sides_[1].floats(index, run, rooms[1]), at, run);
      at += run;
      index.back() += run;
      for (int axis = kAxes - 1; axis > 0 && index[axis] == sizes_[axis]; --axis) {
        index[axis] = 0;
        ++index[axis - 1];
      }
    }
  }

 private:
  struct Side {
    explicit Side(const Tensor& tensor) : data(tensor.const_data_ptr()), dtype(tensor.scalar_type()) {}

    const float* floats(const std::array<int64_t, kAxes>& index, int64_t count, float* room) const {
      int64_t offset = 0;
      for (int axis = 0; axis < kAxes; ++axis) {
        offset += index[axis] * strides[axis];
      }
      const int64_t stride = strides.back();
      if (dtype == ScalarType::Float && (stride == 1 || count == 1)) {
        return static_cast<const float*>(data) + offset;
      }
      with_floating_type(dtype, [&](auto* kind) {
        const auto* typed = static_cast<const std::remove_pointer_t<decltype(kind)>*>(data) + offset;
        for (int64_t i = 0; i < count; ++i) {
          room[i] = static_cast<float>(typed[i * stride]);
        }
      });
      return room;
    }

    const void* data;
    ScalarType dtype;
    std::array<int64_t, kAxes> strides{};
  };

  int64_t numbers_;
  std::array<Side, 2> sides_;
  std::array<int64_t, kAxes> sizes_;
};

void compute(const Tensor& teacher, const Tensor& student, double fraction, Tensor& loss, Tensor& threshold,
             Tensor& count) {
  const Pairs pairs(teacher, student);
  const auto squares = [&](int64_t first, int64_t block, float* room) {
    pairs.for_each_run(first, block, [&](const float* of_teacher, const float* of_student, int64_t at, int64_t run) {
      EFFICIENTAD_FAST_DISPATCH(squared_differences, of_teacher, of_student, run, room + at);
    });
    return room;
  };
  float* const reached = static_cast<float*>(threshold.mutable_data_ptr());
  quantile::quantiles(squares, pairs.numbers(), {fraction}, reached);

  std::vector<Selected> parts(blocks_of(pairs.numbers()));
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), kGrain, [&](int64_t begin, int64_t end) {
    float room[kBlock];
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kBlock;
      const int64_t block = std::min(kBlock, pairs.numbers() - first);
      EFFICIENTAD_FAST_DISPATCH(add_selected, squares(first, block, room), block, *reached, &parts[part]);
    }
  });
  Selected all;
  for (const Selected& part : parts) {
    all.sum += part.sum;
    all.count += part.count;
  }
  *static_cast<int64_t*>(count.mutable_data_ptr()) = all.count;
  *static_cast<float*>(loss.mutable_data_ptr()) = all.count > 0
                                                      ? static_cast<float>(all.sum / static_cast<double>(all.count))
                                                      : std::numeric_limits<float>::quiet_NaN();
}

void hard_feature_loss_out(const Tensor& teacher, const Tensor& student, double fraction, Tensor loss, Tensor threshold,
                           Tensor count, Tensor workspace) {
  hard_feature_loss::check(teacher, student, fraction, /*cuda=*/false);
  hard_feature_loss::check_outputs(teacher, loss, threshold, count, workspace);
  compute(teacher, student, fraction, loss, threshold, count);
}

std::tuple<Tensor, Tensor, Tensor> hard_feature_loss_default(const Tensor& teacher, const Tensor& student,
                                                             double fraction) {
  hard_feature_loss::check(teacher, student, fraction, /*cuda=*/false);
  const auto number = [&](ScalarType dtype) { return torch::stable::new_empty(teacher, {}, dtype); };
  Tensor loss = number(ScalarType::Float), threshold = number(ScalarType::Float), count = number(ScalarType::Long);
  compute(teacher, student, fraction, loss, threshold, count);
  return {loss, threshold, count};
}

Tensor hard_feature_loss_gradient(const Tensor& teacher, const Tensor& student, const Tensor& threshold,
                                  const Tensor& count, const Tensor& grad_loss) {
  hard_feature_loss::check_gradient(teacher, student, threshold, count, grad_loss, /*cuda=*/false);
  Tensor gradient = hard_feature_loss::new_gradient(student);
  const Pairs pairs(teacher, student);
  const float reached = *static_cast<const float*>(threshold.const_data_ptr());
  const float factor = *static_cast<const float*>(grad_loss.const_data_ptr()) /
                       static_cast<float>(*static_cast<const int64_t*>(count.const_data_ptr()));
  torch::stable::parallel_for(0, blocks_of(pairs.numbers()), kGrain, [&](int64_t begin, int64_t end) {
    float room[kBlock];
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kBlock;
      const int64_t block = std::min(kBlock, pairs.numbers() - first);
      pairs.for_each_run(first, block, [&](const float* of_teacher, const float* of_student, int64_t at, int64_t run) {
        EFFICIENTAD_FAST_DISPATCH(gradient_of_squares, of_teacher, of_student, run, reached, factor, room + at);
      });
      store_as(room, gradient.mutable_data_ptr(), gradient.scalar_type(), first, block);
    }
  });
  return gradient;
}

}  // namespace

}  // namespace efficientad_fast

#define EFFICIENTAD_FAST_REGISTER(library)                                                      \
  STABLE_TORCH_LIBRARY_IMPL(library, CPU, m) {                                                  \
    m.impl("hard_feature_loss", TORCH_BOX(&efficientad_fast::hard_feature_loss_default));       \
    m.impl("hard_feature_loss.out", TORCH_BOX(&efficientad_fast::hard_feature_loss_out));       \
    m.impl("hard_feature_loss.gradient", TORCH_BOX(&efficientad_fast::hard_feature_loss_gradient)); \
  }
EFFICIENTAD_FAST_REGISTER(efficientad_fast)
EFFICIENTAD_FAST_REGISTER(efficientad_fast_cpu)
