// hard_feature_loss on a GPU: what hard_feature_loss_kernel.h needs to know of tensors.

#include "../hard_feature_loss.h"
#include "hard_feature_loss_kernel.h"
#include "tensors.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <tuple>

namespace efficientad_fast {

namespace {

using torch::stable::contiguous;
using torch::stable::accelerator::DeviceGuard;

static_assert(sizeof(cuda::LossWorkspace) <= hard_feature_loss::kWorkspace * sizeof(int64_t));
static_assert(cuda::kLossMaxBlocks <= hard_feature_loss::kMostParts);

// Both tensors in rows that they have in common, in place where there are such; else one is a copy, or both.
class Pairs {
 public:
  Pairs(const Tensor& teacher, const Tensor& student) : teacher_(teacher), student_(student) {
    if (hard_feature_loss::has_channels_innermost(student)) {
      teacher_ = channels_behind(teacher);
      student_ = channels_behind(student);
    }
    features.teacher_dtype = cuda::dtype_of(teacher);
    features.student_dtype = cuda::dtype_of(student);
    const Tensor given_teacher = teacher_, given_student = student_;
    take(given_teacher, given_student) || take(contiguous(given_teacher), given_student) ||
        take(given_teacher, contiguous(given_student)) || take(contiguous(given_teacher), contiguous(given_student));
  }

  cuda::FeaturePair features{};

 private:
  bool take(const Tensor& teacher, const Tensor& student) {
    int64_t sizes[cuda::kFeatureAxes], teacher_strides[cuda::kFeatureAxes], student_strides[cuda::kFeatureAxes];
    for (int axis = 0; axis < cuda::kFeatureAxes; ++axis) {
      sizes[axis] = teacher.size(axis);
      teacher_strides[axis] = teacher.stride(axis), student_strides[axis] = student.stride(axis);
    }
    if (!cuda::find_common_rows(sizes, teacher_strides, student_strides, &features)) {
      return false;
    }
    teacher_ = teacher, student_ = student;
    features.teacher = teacher_.const_data_ptr(), features.student = student_.const_data_ptr();
    return true;
  }

  Tensor teacher_, student_;  // which are read
};

void hard_feature_loss_out(const Tensor& teacher, const Tensor& student, double fraction, Tensor loss, Tensor threshold,
                           Tensor count, Tensor workspace) {
  hard_feature_loss::check(teacher, student, fraction, /*cuda=*/true);
  hard_feature_loss::check_outputs(teacher, loss, threshold, count, workspace);
  const DeviceGuard guard(teacher.get_device_index());
  const Pairs pairs(teacher, student);
  cuda::HardFeatureLoss call{};
  call.features = pairs.features;
  call.fraction = fraction;
  call.loss = static_cast<float*>(loss.mutable_data_ptr());
  call.threshold = static_cast<float*>(threshold.mutable_data_ptr());
  call.count = static_cast<int64_t*>(count.mutable_data_ptr());
  call.workspace = static_cast<cuda::LossWorkspace*>(workspace.mutable_data_ptr());
  cuda::launch_hard_feature_loss(call, cuda::current_stream(teacher));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> hard_feature_loss_default(const Tensor& teacher, const Tensor& student,
                                                             double fraction) {
  hard_feature_loss::check(teacher, student, fraction, /*cuda=*/true);
  const DeviceGuard guard(teacher.get_device_index());
  const auto number = [&](ScalarType dtype) { return torch::stable::new_empty(teacher, {}, dtype); };
  Tensor loss = number(ScalarType::Float), threshold = number(ScalarType::Float), count = number(ScalarType::Long);
  Tensor workspace = torch::stable::new_empty(teacher, {hard_feature_loss::kWorkspace}, ScalarType::Long);
  hard_feature_loss_out(teacher, student, fraction, loss, threshold, count, workspace);
  return {loss, threshold, count};
}

Tensor hard_feature_loss_gradient(const Tensor& teacher, const Tensor& student, const Tensor& threshold,
                                  const Tensor& count, const Tensor& grad_loss) {
  hard_feature_loss::check_gradient(teacher, student, threshold, count, grad_loss, /*cuda=*/true);
  const DeviceGuard guard(teacher.get_device_index());
  Tensor gradient = hard_feature_loss::new_gradient(student);
  const Pairs pairs(teacher, student);
  cuda::LossGradient call{};
  call.features = pairs.features;
  call.threshold = static_cast<const float*>(threshold.const_data_ptr());
  call.count = static_cast<const int64_t*>(count.const_data_ptr());
  call.grad_loss = static_cast<const float*>(grad_loss.const_data_ptr());
  call.gradient = gradient.mutable_data_ptr();
  cuda::launch_loss_gradient(call, cuda::current_stream(teacher));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return gradient;
}

}  // namespace

}  // namespace efficientad_fast

STABLE_TORCH_LIBRARY_IMPL(efficientad_fast_cuda, CUDA, m) {
  m.impl("hard_feature_loss", TORCH_BOX(&efficientad_fast::hard_feature_loss_default));
  m.impl("hard_feature_loss.out", TORCH_BOX(&efficientad_fast::hard_feature_loss_out));
  m.impl("hard_feature_loss.gradient", TORCH_BOX(&efficientad_fast::hard_feature_loss_gradient));
}
