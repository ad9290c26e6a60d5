// A height and a width. Without framework types.

#pragma once

#include <cstdint>

namespace efficientad_fast {

struct Size {
  int64_t height = 0, width = 0;
};

}  // namespace efficientad_fast
