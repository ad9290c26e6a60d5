// A stack of its own, switched to and from in user space. A fiber never leaves the system thread that started it.

#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(EFFICIENTAD_FAST_SIMT_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define EFFICIENTAD_FAST_SIMT_UCONTEXT
#endif
#ifdef EFFICIENTAD_FAST_SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace efficientad_fast::simt {

struct Context {
#ifdef EFFICIENTAD_FAST_SIMT_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
};

// `to` will call `entry`, which must not return, at the top of the stack [low, high).
void prepare(Context& to, void* low, void* high, void (*entry)());

void switch_context(Context& from, Context& to);

// Stacks in lazily filled memory. Below the bytes that a stack may use lies a reserve, for the frame that exceeds it to
// be noticed in, and below that memory that cannot be touched.
class Stacks {
 public:
  static constexpr std::size_t kBytes = 256 * 1024;
  Stacks() = default;
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  void reserve(std::size_t count);
  char* low(std::size_t index) const { return memory_ + index * kStride + kGuard + kReserve; }
  char* high(std::size_t index) const { return memory_ + (index + 1) * kStride; }

 private:
  static constexpr std::size_t kGuard = 64 * 1024;    // a multiple of every page size
  static constexpr std::size_t kReserve = 64 * 1024;  // tests/simt_build.py refuses functions with larger frames
  static constexpr std::size_t kStride = kGuard + kReserve + kBytes;
  void release();
  char* memory_ = nullptr;
  std::size_t count_ = 0;
};

}  // namespace efficientad_fast::simt
