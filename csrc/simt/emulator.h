// The emulator as its users see it: launches, the buffers kernels may touch, and what is wrong with a kernel.

#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace efficientad_fast::simt {

struct Index3 {
  unsigned x, y, z;
};

// A kernel did what a GPU would punish, or silently get wrong.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Shadow;

// Device memory: a copy of host memory, alone in a stretch of address space in which nothing else can be touched, at
// the same offset from a multiple of 16 bytes. Kernels may read it while the object lives and, where `writable`, write.
class Buffer {
 public:
  // Of a buffer that is not `initialised` no byte may be read before a kernel wrote it.
  Buffer(std::string name, void* host, std::size_t bytes, bool writable, bool initialised);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(begin_);
  }

  // Copies to the host every byte that is initialised or was written.
  void download() const;

  // How many bytes are neither initialised nor written.
  std::size_t unwritten() const;

  const std::string& name() const { return name_; }
  std::size_t bytes() const { return bytes_; }
  bool writable() const { return writable_; }

 private:
  friend struct Memory;

  std::string name_;
  void* host_;
  std::size_t bytes_;
  bool writable_;
  void* reserved_ = nullptr;
  std::size_t reserved_bytes_ = 0;
  std::uintptr_t begin_ = 0;
  Shadow* shadow_ = nullptr;  // of writable buffers
};

// `arguments` is what `invoke` hands to the kernel; the kernel may read it.
struct Launch {
  const void* kernel;
  void (*invoke)(const void* kernel, const void* arguments);
  const void* arguments;
  std::size_t argument_bytes;
  Index3 grid, block;
  std::size_t dynamic_shared_bytes;
};

// Runs every block. Throws KernelError with what the block of the lowest index did first.
void run(const Launch& launch);

struct Settings {
  int threads = 1;           // operating-system threads that run blocks
  std::uint64_t order = 0;   // 0: blocks and threads by index; else the seed of another order
};
Settings& settings();

struct Counts {
  std::uint64_t accesses = 0, switches = 0, blocks = 0;
};
// What the launches since the last call did.
Counts take_counts();

// Shared variables with too little between them for an access past one of them to be noticed; none, as a rule.
std::vector<std::string> unguarded_shared_variables();

// What device code calls (csrc/simt/device.h gives the names of CUDA C++ to it).

enum class WarpOperation : std::uint8_t {
  kSync,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAny,
  kAll,
  // Of all lanes, and no order among them.
  kLoadTwo,
  kLoadFour,
  kMultiplyFloat16,
  kMultiplyBFloat16,
  kMultiplyE4m3,
  kBarrierSync,
  kBarrierArrive,
};
enum class BlockOperation : std::uint8_t { kSync, kOr, kAnd, kCount };

__attribute__((const)) Index3 thread_index() noexcept;
__attribute__((const)) Index3 block_index() noexcept;
__attribute__((const)) Index3 block_extent() noexcept;
__attribute__((const)) Index3 grid_extent() noexcept;
__attribute__((const)) void* dynamic_shared() noexcept;
int block_barrier(BlockOperation operation, int predicate);
std::uint64_t warp_operation(WarpOperation operation, unsigned mask, std::uint64_t value, int argument, int width);
__attribute__((const)) unsigned lane_index() noexcept;
void fence();
[[noreturn]] void trap();

// What csrc/simt/ptx.h calls. Structures, so that no address of a kernel's registers is taken.

struct Matrices {
  std::uint32_t registers[4];
};
struct Sums {
  float numbers[4];
};

void copy_async(void* shared, const void* global, unsigned bytes, bool taken);
void commit_copies();
void wait_for_copies(unsigned pending);
Matrices load_matrices(WarpOperation operation, const void* row);
Sums multiply_add(WarpOperation operation, Sums sums, Matrices left, std::uint64_t right);
void named_barrier(WarpOperation operation, int barrier, int threads);

}  // namespace efficientad_fast::simt
