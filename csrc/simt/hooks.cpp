// What `-fsanitize=thread` makes a compiler call at every load, store and atomic operation. The sanitizer's own runtime
// is not linked; these take its place.

#include "machine.h"

#include <cstring>

namespace efficientad_fast::simt {
namespace {

inline void look(const volatile void* pointer, std::size_t bytes, std::size_t alignment, Access access,
                 const void* caller) {
  Thread* const thread = running;
  if (thread == nullptr) {
    return;
  }
  running = nullptr;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if ((address & (alignment - 1)) != 0) {
    fail_alignment(*thread, address, bytes, access, caller);
  }
  touch(*thread, address, bytes, access, caller);
  if (is_atomic(access)) {
    release_and_learn(*thread, address, writes(access));
  }
  running = thread;
}

}  // namespace
}  // namespace efficientad_fast::simt

using efficientad_fast::simt::Access;
using efficientad_fast::simt::look;

#define CALLER __builtin_return_address(0)

extern "C" {

void __tsan_init() {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_ignore_thread_begin() {}
void __tsan_ignore_thread_end() {}

void __tsan_read_range(void* address, unsigned long bytes) { look(address, bytes, 1, Access::kRead, CALLER); }
void __tsan_write_range(void* address, unsigned long bytes) { look(address, bytes, 1, Access::kWrite, CALLER); }

#define ACCESSES(bytes)                                                                                             \
  void __tsan_read##bytes(void* address) { look(address, bytes, bytes, Access::kRead, CALLER); }                    \
  void __tsan_write##bytes(void* address) { look(address, bytes, bytes, Access::kWrite, CALLER); }                  \
  void __tsan_volatile_read##bytes(void* address) { look(address, bytes, bytes, Access::kRead, CALLER); }           \
  void __tsan_volatile_write##bytes(void* address) { look(address, bytes, bytes, Access::kWrite, CALLER); }         \
  void __tsan_unaligned_read##bytes(void* address) { look(address, bytes, 1, Access::kRead, CALLER); }              \
  void __tsan_unaligned_write##bytes(void* address) { look(address, bytes, 1, Access::kWrite, CALLER); }            \
  void __tsan_unaligned_volatile_read##bytes(void* address) { look(address, bytes, 1, Access::kRead, CALLER); }     \
  void __tsan_unaligned_volatile_write##bytes(void* address) { look(address, bytes, 1, Access::kWrite, CALLER); }   \
  void __tsan_read_write##bytes(void* address) {                                                                    \
    look(address, bytes, bytes, Access::kRead, CALLER);                                                             \
    look(address, bytes, bytes, Access::kWrite, CALLER);                                                            \
  }                                                                                                                 \
  void __tsan_unaligned_read_write##bytes(void* address) {                                                          \
    look(address, bytes, 1, Access::kRead, CALLER);                                                                 \
    look(address, bytes, 1, Access::kWrite, CALLER);                                                                \
  }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

#define FETCH(bits, type, name, builtin)                                                      \
  type __tsan_atomic##bits##_fetch_##name(volatile type* address, type value, int) {          \
    look(address, sizeof(type), sizeof(type), Access::kAtomicUpdate, CALLER);                 \
    return builtin(address, value, __ATOMIC_SEQ_CST);                                         \
  }
#define ATOMICS(bits, type)                                                                                       \
  type __tsan_atomic##bits##_load(const volatile type* address, int) {                                            \
    look(address, sizeof(type), sizeof(type), Access::kAtomicRead, CALLER);                                       \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                                            \
  }                                                                                                               \
  void __tsan_atomic##bits##_store(volatile type* address, type value, int) {                                     \
    look(address, sizeof(type), sizeof(type), Access::kAtomicWrite, CALLER);                                      \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                               \
  type __tsan_atomic##bits##_exchange(volatile type* address, type value, int) {                                  \
    look(address, sizeof(type), sizeof(type), Access::kAtomicUpdate, CALLER);                                     \
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                                               \
  FETCH(bits, type, add, __atomic_fetch_add)                                                                      \
  FETCH(bits, type, sub, __atomic_fetch_sub)                                                                      \
  FETCH(bits, type, and, __atomic_fetch_and)                                                                      \
  FETCH(bits, type, or, __atomic_fetch_or)                                                                        \
  FETCH(bits, type, xor, __atomic_fetch_xor)                                                                      \
  FETCH(bits, type, nand, __atomic_fetch_nand)                                                                    \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* address, type* expected, type desired, int,    \
                                                    int) {                                                        \
    look(address, sizeof(type), sizeof(type), Access::kAtomicUpdate, CALLER);                                     \
    return __atomic_compare_exchange_n(address, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);    \
  }                                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile type* address, type* expected, type desired, int,      \
                                                  int) {                                                          \
    look(address, sizeof(type), sizeof(type), Access::kAtomicUpdate, CALLER);                                     \
    return __atomic_compare_exchange_n(address, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);    \
  }                                                                                                               \
  type __tsan_atomic##bits##_compare_exchange_val(volatile type* address, type expected, type desired, int, int) { \
    look(address, sizeof(type), sizeof(type), Access::kAtomicUpdate, CALLER);                                     \
    __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);          \
    return expected;                                                                                              \
  }
ATOMICS(8, unsigned char)
ATOMICS(16, unsigned short)
ATOMICS(32, unsigned int)
ATOMICS(64, unsigned long)

void __tsan_atomic_thread_fence(int) {
  if (efficientad_fast::simt::running != nullptr) {
    efficientad_fast::simt::fence();
  }
}
void __tsan_atomic_signal_fence(int) {}

// instrumented.h gives these names to memcpy, memmove and memset.
void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) {
  look(from, bytes, 1, Access::kRead, CALLER);
  look(to, bytes, 1, Access::kWrite, CALLER);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, unsigned long bytes) {
  look(from, bytes, 1, Access::kRead, CALLER);
  look(to, bytes, 1, Access::kWrite, CALLER);
  return std::memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, unsigned long bytes) {
  look(to, bytes, 1, Access::kWrite, CALLER);
  return std::memset(to, value, bytes);
}

}  // extern "C"
