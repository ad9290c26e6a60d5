// Included first in every instrumented file: a compiler's own expansion of these functions would be seen by nobody.

#pragma once

#include <stddef.h>

extern "C" {
void* memcpy(void*, const void*, size_t) noexcept __asm__("__tsan_memcpy");
void* memmove(void*, const void*, size_t) noexcept __asm__("__tsan_memmove");
void* memset(void*, int, size_t) noexcept __asm__("__tsan_memset");
}
