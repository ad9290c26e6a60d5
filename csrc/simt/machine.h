// The emulator's insides: what is known of every byte, every thread, every warp and every block.
// README.md says what the rules are; memory.cpp judges accesses, machine.cpp runs threads, ptx.cpp does what PTX adds.

#pragma once

#include "emulator.h"
#include "fiber.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace efficientad_fast::simt {

constexpr unsigned kWarp = 32;

// A block has a number that no other block of any launch has; 0 is nobody. An epoch is how many barriers the block has
// passed, a clock how many times the warp was ordered: see `Thread`.
struct Touch {
  std::uint32_t block, epoch, clock, thread;
};

// Who touched a byte last, in the three ways that matter to each other.
struct Cell {
  static constexpr std::uint32_t kApart = 253, kSeveralWarps = 254, kSeveralBlocks = 255;
  static constexpr std::uint32_t kSeveralThreads = ~0u;

  Touch write;
  Touch atomic;  // since that write
  // Of several readers since that write the latest epoch and clock; `warp` may be one of the constants. `lanes` has a
  // bit for every lane that read; of several warps one for every warp, or, where they are kept apart, the index of the
  // worker's `Readers`; of several blocks it is the thread, if it was the same one in all.
  struct {
    std::uint32_t block, epoch, clock, lanes, warp;
  } read;
};

// Who read a byte in this epoch, by warp: since named barriers order some warps of the block and not others.
struct Readers {
  std::array<std::uint32_t, kWarp> lanes, clocks;
};

// By thread of the block the last clock that is over; null where nothing is known.
using Clocks = std::shared_ptr<const std::vector<std::uint32_t>>;

// The thread of a block that copies to a word and has not waited for it.
struct UnderWay {
  std::uint32_t block, thread;
};

// Four bytes that were always touched together have one cell, in `first`. The other three of a word in `split` are in
// `rest`, apart, so that memory in which no word is split has no use for it.
struct Shadow {
  Cell *first, *rest;
  std::uint8_t* split;
  std::uint8_t* written;  // of global memory; shared memory is written if this block has written it
  UnderWay* under_way;    // of shared memory, by word
  void* mapping;
  std::size_t mapping_bytes;

  Cell& cell(std::size_t word, std::size_t byte) { return byte == 0 ? first[word] : rest[word * 3 + byte - 1]; }

  static Shadow* make(std::size_t bytes, bool global);
  static void destroy(Shadow* shadow);
};

struct Region {
  enum class Kind : std::uint8_t { kGlobal, kShared, kConstant };
  std::uintptr_t begin, end;
  Shadow* shadow;  // null where nobody may write
  Kind kind;
  const std::string* name;
};

// What a thread had done, and what it knew, when it passed a fence; handed on by its next atomic operation.
struct Release {
  std::uint32_t block, epoch;
  std::vector<std::uint32_t> clocks;  // by thread, of this epoch; all earlier epochs of the block are included
  std::vector<struct Known> known;
};

// The releases at one address, in the order of the atomic operations there.
struct Releases {
  std::vector<std::shared_ptr<const Release>> list;
};

// The first `count` releases of an address.
struct Known {
  const Releases* releases;
  std::size_t count;
};

// An asynchronous copy, whose bytes reach shared memory once its thread has waited for it.
struct Copy {
  char* to;
  const void* from;  // null: zeros
  std::size_t bytes;
  std::array<char, 16> content;  // of `from` when it began
  const void* caller;
};

struct Warp;
struct Worker;

struct Thread {
  enum class Status : std::uint8_t { kReady, kAtWarp, kAtBlock, kAtBarrier, kExited };

  Context context;
  Worker* worker;
  Warp* warp;
  std::uintptr_t stack_low, stack_high;
  Index3 position;
  unsigned index, lane;
  Status status;

  // What it waits for.
  WarpOperation warp_operation;
  BlockOperation block_operation;
  unsigned mask;
  std::uint64_t value;
  int argument, width;  // of a named barrier its number and its threads
  std::array<std::uint32_t, 10> registers;  // of matrices: what it gives, and then from the first what it gets
  const void* caller;

  // Between two points that order it with lanes of its warp a thread has one clock, taken from its warp's counter.
  // `seen[lane]` is the last clock of that lane that is over for this thread.
  std::uint32_t clock;
  std::array<std::uint32_t, kWarp> seen;
  Clocks others;  // the same of other warps, from named barriers of this epoch

  std::uint32_t fence_epoch;  // 0: no fence yet
  std::array<std::uint32_t, kWarp> fence_seen;
  Clocks fence_others;
  std::uint64_t touches;
  std::vector<Known> known;

  std::vector<Copy> copies;         // under way, the oldest first
  std::vector<std::size_t> groups;  // how many of them each group has; the rest is not committed
};

struct Warp {
  unsigned first, lanes;
  unsigned waiting;  // lanes in an operation of the warp
  std::uint32_t counter;
};

// One of a block's named barriers. A warp that comes in the phase that is under way must know of all that came in the
// one before: else it might have come in that one instead.
struct NamedBarrier {
  static constexpr int kCount = 16;
  struct Phase {
    std::uint32_t warps = 0;  // that came, a bit each
    std::array<std::uint32_t, kWarp> epochs{}, clocks{};  // when, by warp
  };
  Phase phase, before;
  int threads = 0;
  std::uint32_t waiting = 0;  // of `phase.warps`
  const Thread* first = nullptr;
  std::string call;  // of `first`
  const void* caller = nullptr;

  // Of all that came.
  Clocks seen, fenced;
  std::uint32_t fence_epoch = 0;
  std::vector<Known> known;
};

struct Machine;

// Runs blocks, one at a time, on one system thread.
struct Worker {
  Machine* machine = nullptr;
  Context scheduler;
  Stacks stacks;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned> warp_order, lane_order;

  // The block.
  std::uint32_t number = 0, epoch = 0;
  Index3 position{};
  bool fenced = false;  // by any thread in this epoch
  bool learned = false;
  std::shared_ptr<const Release> fences;  // of all threads, in an earlier epoch
  std::vector<Known> known;
  std::size_t copies = 0;   // under way, of all threads
  std::array<NamedBarrier, NamedBarrier::kCount> barriers;
  std::uint32_t barrier_epoch = 0;  // the last in which a named barrier was come to
  std::vector<Readers> readers;     // of this epoch
  std::vector<std::uint32_t> free_readers;
  std::uint64_t place = 0;  // in the order of blocks
  bool failed = false;

  // Memory.
  std::vector<Region> regions;  // by address
  static constexpr std::size_t kRecent = 64;
  std::array<const Region*, kRecent> recent{};  // by page
  std::vector<Shadow*> shared_shadows;
  Shadow* dynamic_shadow = nullptr;
  std::size_t dynamic_capacity = 0;
  char* dynamic_memory = nullptr;

  Counts counts;

  Worker();
  ~Worker();
  void start(Machine& machine);
  void run_blocks();
  void run_block(std::uint64_t block_index);
  void come_to_barrier(Warp& warp, WarpOperation operation);
  std::uint32_t keep(const Readers& one);

 private:
  void pass_barrier();
  void complete(NamedBarrier& barrier);
  std::string deadlock(const Thread** of) const;
};

// One launch.
struct Machine {
  const Launch* launch;
  std::string kernel;
  std::uint32_t first_number;
  unsigned block_threads;
  std::uint64_t blocks;
  bool parallel;

  std::mutex mutex;
  std::vector<std::uint32_t> order;  // of blocks
  std::atomic<std::uint64_t> next{0};
  std::atomic<std::uint64_t> failed_at{~std::uint64_t{0}};  // in `order`
  std::string failure;

  std::mutex releases_mutex;
  std::unordered_map<std::uintptr_t, std::unique_ptr<Releases>> releases;
  std::atomic<bool> any_release{false};
};

enum class Access : std::uint8_t { kRead, kWrite, kAtomicRead, kAtomicWrite, kAtomicUpdate };

inline bool reads(Access access) { return access != Access::kWrite && access != Access::kAtomicWrite; }
inline bool writes(Access access) { return access != Access::kRead && access != Access::kAtomicRead; }
inline bool is_atomic(Access access) { return access != Access::kRead && access != Access::kWrite; }

// The running thread of this system thread; null outside kernels and while the emulator itself is at work, whose own
// loads and stores (in templates that it shares with instrumented code) are nobody's business.
extern __thread Thread* running;

class Paused {
 public:
  Paused() : thread_(running) { running = nullptr; }
  ~Paused() { running = thread_; }
  Paused(const Paused&) = delete;
  Paused& operator=(const Paused&) = delete;
  Thread* operator->() const { return thread_; }
  Thread& operator*() const { return *thread_; }

 private:
  Thread* const thread_;
};

// Judges an access by the running thread; does not return if it is wrong.
void touch(Thread& thread, std::uintptr_t address, std::size_t bytes, Access access, const void* caller);

// Do not return if `pointer` is no multiple of `bytes`, or lies in memory of another kind; `what` begins the sentence.
// Whether there is any memory is left to `touch`.
void require_aligned(Thread& thread, const void* pointer, std::size_t bytes, const char* what, const void* caller);
void require_kind(Thread& thread, const void* pointer, Region::Kind kind, const char* what, const void* caller);

void mark_under_way(Thread& thread, const Copy& copy);
void clear_under_way(Thread& thread, const Copy& copy);

// "tile + 4"
std::string place_of(Thread& thread, const void* pointer);

[[noreturn]] void fail_alignment(Thread& thread, std::uintptr_t address, std::size_t bytes, Access access,
                                 const void* caller);

// Ends the block of a launch with a sentence about a thread: "KERNEL: block (..) thread (..) WHAT (FILE:LINE)".
[[noreturn]] void fail(Thread& thread, const std::string& what, const void* caller);

// "__syncwarp(0xffffffff)", as the thread calls it.
std::string call_text(const Thread& thread, WarpOperation operation);

// Has the running thread wait until all lanes of `mask` have come to the operation, and what it exchanges is exchanged.
void wait_for_warp(Thread& thread, WarpOperation operation, unsigned mask, const void* caller);

// What has no mask, takes all 32 lanes, and orders none of them.
inline bool is_of_all_lanes(WarpOperation operation) { return operation >= WarpOperation::kLoadTwo; }
inline bool is_of_barriers(WarpOperation operation) { return operation >= WarpOperation::kBarrierSync; }

// What a warp that has all 32 lanes in an operation on matrices exchanges.
void exchange_matrices(Worker& worker, const Warp& warp, WarpOperation operation);

std::string text(const Index3& index);
Index3 position_of(std::uint64_t index, const Index3& extent);

// What an atomic operation at `address` takes over from others and, where it `releases`, hands on to others.
void release_and_learn(Thread& thread, std::uintptr_t address, bool releases);
void merge(std::vector<Known>& into, const std::vector<Known>& from);
void include(std::vector<std::uint32_t>& into, const Clocks& clocks);

// The registered buffers, as regions.
std::vector<Region> buffer_regions();

}  // namespace efficientad_fast::simt
