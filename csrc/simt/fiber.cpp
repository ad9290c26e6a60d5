#include "fiber.h"

#include <sys/mman.h>

#include <new>

#ifndef EFFICIENTAD_FAST_SIMT_UCONTEXT
extern "C" void efficientad_fast_simt_switch(void** from, void* to);
#endif

#if defined(EFFICIENTAD_FAST_SIMT_UCONTEXT)
#elif defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl efficientad_fast_simt_switch
.hidden efficientad_fast_simt_switch
.type efficientad_fast_simt_switch, @function
efficientad_fast_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size efficientad_fast_simt_switch, . - efficientad_fast_simt_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.globl efficientad_fast_simt_switch
.hidden efficientad_fast_simt_switch
.type efficientad_fast_simt_switch, %function
efficientad_fast_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size efficientad_fast_simt_switch, . - efficientad_fast_simt_switch
)");
#endif

namespace efficientad_fast::simt {

#ifdef EFFICIENTAD_FAST_SIMT_UCONTEXT

void prepare(Context& to, void* low, void* high, void (*entry)()) {
  getcontext(&to.registers);
  to.registers.uc_stack.ss_sp = low;
  to.registers.uc_stack.ss_size = static_cast<char*>(high) - static_cast<char*>(low);
  to.registers.uc_link = nullptr;
  makecontext(&to.registers, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }

#else

void prepare(Context& to, void*, void* high, void (*entry)()) {
  void** top = static_cast<void**>(high);
#ifdef __x86_64__
  *--top = nullptr;  // so that `entry` finds the stack aligned as a called function does
  *--top = reinterpret_cast<void*>(entry);
  constexpr int kSaved = 6;
#else
  constexpr int kSaved = 20;
#endif
  for (int i = 0; i < kSaved; ++i) {
    *--top = nullptr;
  }
#ifdef __aarch64__
  top[11] = reinterpret_cast<void*>(entry);
#endif
  to.stack_pointer = top;
}

void switch_context(Context& from, Context& to) {
  efficientad_fast_simt_switch(&from.stack_pointer, to.stack_pointer);
}

#endif

void Stacks::reserve(std::size_t count) {
  if (count <= count_) {
    return;
  }
  release();
  void* const memory =
      mmap(nullptr, count * kStride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  memory_ = static_cast<char*>(memory);
  count_ = count;
  for (std::size_t i = 0; i < count; ++i) {
    mprotect(memory_ + i * kStride, kGuard, PROT_NONE);
  }
}

void Stacks::release() {
  if (memory_ != nullptr) {
    munmap(memory_, count_ * kStride);
    memory_ = nullptr;
    count_ = 0;
  }
}

Stacks::~Stacks() { release(); }

}  // namespace efficientad_fast::simt
