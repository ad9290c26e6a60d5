// What the emulator's own library says about itself: names of kernels, bounds of shared variables, lines of source.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace efficientad_fast::simt {

struct SharedVariable {
  std::string name;
  std::size_t offset;  // in the library's thread-local memory
  std::size_t bytes;
};

struct AddressRange {
  std::uintptr_t begin, end;
};

struct Symbols {
  std::vector<SharedVariable> shared;  // by offset
  std::vector<std::string> unguarded;
  std::size_t marker_offset = 0;            // of `thread_local_marker` in the library's thread-local memory
  std::vector<AddressRange> constants;      // read-only memory of the library
  std::string kernel_name(const void* function) const;

  // "file.h:12" of the call that returns to `address`, or nothing where that cannot be told.
  std::string source_line(const void* address) const;

 private:
  friend const Symbols& symbols();
  void read();
  struct Function {
    std::uintptr_t begin, end;
    std::string name;
  };
  std::vector<Function> functions_;
  std::string path_;
  std::uintptr_t base_ = 0;
};

// Read once; throws std::runtime_error where the library cannot be read.
const Symbols& symbols();

// Any thread's copy of it tells where that thread's shared variables are.
extern thread_local char thread_local_marker;

}  // namespace efficientad_fast::simt
