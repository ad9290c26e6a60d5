// Packed weights, workspaces and layouts of activations: what conv_pool, feature_distance and autoencoder check alike.
// efficientad_fast/ops/packing.py says the same in Python and describes the layouts.

#pragma once

#include "checks.h"
#include "layouts.h"
#include "size.h"

#include <cstdint>
#include <string>
#include <vector>

namespace efficientad_fast::packing {

inline constexpr int64_t kChunk = 16;                    // what the depth of packed weights is a multiple of
inline constexpr int64_t kPanel = 32;                    // outputs that lie together in them
inline constexpr int64_t kMostKernel = 16;               // side of the largest kernel
inline constexpr int64_t kWorkspace = int64_t{1} << 21;  // numbers that a thread needs

// What a convolution reads: channels (of one group), and its kernel.
struct Source {
  int64_t channels = 0, kernel = 1;
};

inline int64_t rounded_up(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

inline int64_t panels_of(int64_t outputs) {
  return (outputs - 1) / kPanel + 1;
}

// The side of what a tile reads, squared.
inline int64_t planes_of(int64_t tile, int64_t kernel) {
  return (tile + kernel - 1) * (tile + kernel - 1);
}

// The kernel of the domain in which all sources are added: a smaller one is filled up with zeros.
inline int64_t largest_kernel(const std::vector<Source>& sources) {
  int64_t largest = 0;
  for (const Source& source : sources) {
    largest = source.kernel > largest ? source.kernel : largest;
  }
  return largest;
}

// Winograd's domains are for these; everything fits the direct way.
inline bool fits_winograd(int64_t kernel) {
  return kernel == 3 || kernel == 4;
}

inline int64_t depth_of(int64_t planes, const std::vector<Source>& sources) {
  int64_t depth = 0;
  for (const Source& source : sources) {
    depth += rounded_up(planes == 1 ? source.channels * source.kernel * source.kernel : source.channels, kChunk);
  }
  return depth;
}

inline std::vector<int64_t> packed_shape(int64_t groups, int64_t outputs, int64_t planes,
                                         const std::vector<Source>& sources) {
  return {groups, panels_of(outputs), planes, depth_of(planes, sources), kPanel};
}

// A block of one place, with four outputs where they are pooled, must fit into a thread's workspace.
inline void check_depth(const char* name, int64_t planes, int64_t depth) {
  const int64_t most = kWorkspace / (4 * planes) - 128;
  EFFICIENTAD_FAST_REQUIRE(depth <= most, name, "packed",
                           "at most " + std::to_string(most) + " deep for " + std::to_string(planes) + " planes", depth);
}

// The number of planes that an algorithm gives, which 'auto' chooses.
inline int64_t planes_for(const char* name, const std::string& algorithm, const std::vector<Source>& sources) {
  const int64_t kernel = largest_kernel(sources);
  const std::string quoted = "'" + algorithm + "'";
  const bool known =
      algorithm == "auto" || algorithm == "direct" || algorithm == "winograd4" || algorithm == "winograd6";
  EFFICIENTAD_FAST_REQUIRE(known, name, "algorithm", "'auto', 'direct', 'winograd4' or 'winograd6'", quoted);
  if (algorithm == "direct") {
    return 1;
  }
  if (algorithm == "auto") {
    bool direct = !fits_winograd(kernel) || sources[0].channels < kChunk;
    for (const Source& source : sources) {
      direct = direct || source.kernel == 1;
    }
    return direct ? 1 : planes_of(kernel == 3 ? 6 : 4, kernel);
  }
  const std::string side = std::to_string(kernel);
  EFFICIENTAD_FAST_REQUIRE(fits_winograd(kernel), name, "algorithm",
                           "'auto' or 'direct' for a " + side + "x" + side + " kernel", quoted);
  return planes_of(algorithm == "winograd4" ? 4 : 6, kernel);
}

inline int64_t checked_planes(const char* name, const std::string& algorithm, const std::vector<Source>& sources) {
  const int64_t planes = planes_for(name, algorithm, sources);
  check_depth(name, planes, depth_of(planes, sources));
  return planes;
}

inline void require_float32(const char* name, const char* argument, const Tensor& given) {
  EFFICIENTAD_FAST_REQUIRE(given.scalar_type() == ScalarType::Float, name, argument, "float32",
                           dtype_text(given.scalar_type()));
}

// Of the `mixed` overloads: products of narrow numbers, sums in float32.
inline void require_mixed(const char* name, const char* argument, const Tensor& given) {
  const bool known = is_one_of(given.scalar_type(), {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16,
                                                     ScalarType::Float8_e4m3fn});
  EFFICIENTAD_FAST_REQUIRE(known, name, argument, "float32, float16, bfloat16 or float8_e4m3fn",
                           dtype_text(given.scalar_type()));
}

inline void check_dtype(const char* name, const char* argument, const Tensor& given, bool mixed) {
  mixed ? require_mixed(name, argument, given) : require_float32(name, argument, given);
}

inline void check_same_dtype(const char* name, const char* argument, const Tensor& given, const char* first_name,
                             const Tensor& first) {
  EFFICIENTAD_FAST_REQUIRE(given.scalar_type() == first.scalar_type(), name, argument,
                           dtype_text(first.scalar_type()) + " as " + first_name + " is",
                           dtype_text(given.scalar_type()));
}

inline bool is_positive(const Tensor& given, int first) {
  for (int axis = first; axis < given.dim(); ++axis) {
    if (given.size(axis) < 1) {
      return false;
    }
  }
  return true;
}

// mixed: for an overload that takes narrower numbers too, as below.
inline void check_images(const char* name, const char* argument, const Tensor& given, bool mixed = false) {
  EFFICIENTAD_FAST_REQUIRE(given.dim() == 4 && is_positive(given, 1), name, argument,
                           "(N, C, H, W) with C, H and W of at least 1", shape_text(given));
  check_dtype(name, argument, given, mixed);
}

inline void check_channels(const char* name, const char* argument, const Tensor& given, int64_t channels,
                           const char* reason) {
  EFFICIENTAD_FAST_REQUIRE(given.size(1) == channels, name, argument,
                           "(N, " + std::to_string(channels) + ", H, W) for " + reason, shape_text(given));
}

inline void check_weight(const char* name, const char* argument, const Tensor& given, bool mixed = false) {
  const bool square = given.dim() == 4 && is_positive(given, 0) && given.size(2) == given.size(3) &&
                      given.size(2) <= kMostKernel;
  EFFICIENTAD_FAST_REQUIRE(square, name, argument,
                           "(outputs, channels, k, k) with all of at least 1 and k at most 16", shape_text(given));
  check_dtype(name, argument, given, mixed);
}

inline void check_kernel(const char* name, const char* argument, int64_t kernel) {
  EFFICIENTAD_FAST_REQUIRE(kernel >= 1 && kernel <= kMostKernel, name, argument, "from 1 to 16", kernel);
}

inline void check_padding(const char* name, const char* argument, int64_t padding, int64_t kernel) {
  const std::string side = std::to_string(kernel);
  EFFICIENTAD_FAST_REQUIRE(padding >= 0 && padding < kernel, name, argument,
                           "from 0 to " + std::to_string(kernel - 1) + " for a " + side + "x" + side + " kernel",
                           padding);
}

inline std::string size_text(int64_t height, int64_t width) {
  return std::to_string(height) + "x" + std::to_string(width);
}

// Of a convolution whose padding was checked; images too small for it, and for pooling after it, are refused.
inline Size checked_size(const char* name, const char* argument, const Tensor& images, int64_t kernel, int64_t padding,
                         bool pool = false, int64_t pool_padding = 0) {
  const int64_t height = images.size(2), width = images.size(3);
  const int64_t outputs = pool && pool_padding == 0 ? 2 : 1;
  int64_t least = kernel - 2 * padding + outputs - 1;
  least = least < 1 ? 1 : least;
  EFFICIENTAD_FAST_REQUIRE(height >= least && width >= least, name, argument,
                           "at least " + size_text(least, least) + " pixels for a " + size_text(kernel, kernel) +
                               " kernel with padding " + std::to_string(padding) + (pool ? " and pooling" : ""),
                           size_text(height, width));
  const Size size{height + 2 * padding - kernel + 1, width + 2 * padding - kernel + 1};
  return pool ? Size{(size.height + 2 * pool_padding) / 2, (size.width + 2 * pool_padding) / 2} : size;
}

inline void check_bias(const char* name, const char* argument, const Tensor& given, int64_t outputs,
                       const char* first_name, const Tensor& first) {
  EFFICIENTAD_FAST_REQUIRE(given.dim() == 1 && given.size(0) == outputs, name, argument,
                           "(" + std::to_string(outputs) + ",)", shape_text(given));
  require_float32(name, argument, given);
  require_device_of(name, first_name, first, argument, given);
}

// Packed weights of one of the algorithms that fit, or of the direct way alone.
inline void check_packed(const char* name, const char* argument, const Tensor& given, int64_t groups, int64_t outputs,
                         const std::vector<Source>& sources, const char* first_name, const Tensor& first,
                         bool direct_alone = false) {
  const int64_t kernel = largest_kernel(sources);
  std::vector<int64_t> fitting{1};
  if (fits_winograd(kernel) && !direct_alone) {
    fitting.insert(fitting.end(), {planes_of(4, kernel), planes_of(6, kernel)});
  }
  bool found = false;
  std::string expected;
  for (const int64_t planes : fitting) {
    const std::string shape = text(packed_shape(groups, outputs, planes, sources));
    found = found || shape_text(given) == shape;
    expected += (expected.empty() ? "" : " or ") + shape;
  }
  EFFICIENTAD_FAST_REQUIRE(found, name, argument, expected, shape_text(given));
  require_float32(name, argument, given);
  EFFICIENTAD_FAST_REQUIRE(given.is_contiguous(), name, argument, "contiguous", "strides " + text(given.strides()));
  check_depth(name, given.size(2), given.size(3));
  require_device_of(name, first_name, first, argument, given);
}

inline void check_workspace(const char* name, const Tensor& given, int64_t numbers, const char* first_name,
                            const Tensor& first) {
  const bool fitting = given.dim() == 2 && given.size(0) >= 1 && given.size(1) >= numbers;
  EFFICIENTAD_FAST_REQUIRE(fitting, name, "workspace",
                           "(threads, numbers) of at least (1, " + std::to_string(numbers) + ")", shape_text(given));
  require_float32(name, "workspace", given);
  EFFICIENTAD_FAST_REQUIRE(given.is_contiguous(), name, "workspace", "contiguous",
                           "strides " + text(given.strides()));
  require_device_of(name, first_name, first, "workspace", given);
}

// Of the `mixed` overloads, but for its dtype.
inline void check_mixed_workspace(const char* name, const Tensor& given, int64_t numbers, const char* first_name,
                                  const Tensor& first) {
  EFFICIENTAD_FAST_REQUIRE(given.dim() == 1 && given.size(0) >= numbers, name, "workspace",
                           "(numbers,) of at least (" + std::to_string(numbers) + ",)", shape_text(given));
  EFFICIENTAD_FAST_REQUIRE(given.is_contiguous(), name, "workspace", "contiguous",
                           "strides " + text(given.strides()));
  require_device_of(name, first_name, first, "workspace", given);
}

// Activations to write, whose shape was checked.
inline void check_activations(const char* name, const char* argument, const Tensor& given, const char* first_name,
                              const Tensor& first, bool mixed = false) {
  check_dtype(name, argument, given, mixed);
  EFFICIENTAD_FAST_REQUIRE(is_dense_channels_last(given), name, argument, "dense and channels-last",
                           "strides " + text(given.strides()));
  require_device_of(name, first_name, first, argument, given);
}

}  // namespace efficientad_fast::packing
