// Runs the threads of blocks as fibers, and the operations by which they wait for each other.

#include "machine.h"

#include "symbols.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <system_error>
#include <thread>

namespace efficientad_fast::simt {

__thread Thread* running = nullptr;

namespace {

constexpr unsigned kMostThreads = 1024;
constexpr std::size_t kMostSharedBytes = 227 * 1024;
constexpr std::size_t kGuardBytes = 64 * 1024;

const char* name_of(WarpOperation operation) {
  switch (operation) {
    case WarpOperation::kSync: return "__syncwarp";
    case WarpOperation::kShuffle: return "__shfl_sync";
    case WarpOperation::kShuffleUp: return "__shfl_up_sync";
    case WarpOperation::kShuffleDown: return "__shfl_down_sync";
    case WarpOperation::kShuffleXor: return "__shfl_xor_sync";
    case WarpOperation::kBallot: return "__ballot_sync";
    case WarpOperation::kAny: return "__any_sync";
    case WarpOperation::kAll: return "__all_sync";
    case WarpOperation::kLoadTwo: return "load_matrices of two";
    case WarpOperation::kLoadFour: return "load_matrices of four";
    case WarpOperation::kMultiplyFloat16: return "multiply_add of float16";
    case WarpOperation::kMultiplyBFloat16: return "multiply_add of bfloat16";
    case WarpOperation::kMultiplyE4m3: return "multiply_add of e4m3";
    case WarpOperation::kBarrierSync: return "named_barrier_sync";
    case WarpOperation::kBarrierArrive: return "named_barrier_arrive";
  }
  return "";
}

const char* name_of(BlockOperation operation) {
  switch (operation) {
    case BlockOperation::kSync: return "__syncthreads";
    case BlockOperation::kOr: return "__syncthreads_or";
    case BlockOperation::kAnd: return "__syncthreads_and";
    case BlockOperation::kCount: return "__syncthreads_count";
  }
  return "";
}

std::string hexadecimal(unsigned mask) {
  char digits[16];
  std::snprintf(digits, sizeof(digits), "0x%x", mask);
  return digits;
}

std::string call_text(WarpOperation operation, unsigned mask) {
  return name_of(operation) + (is_of_all_lanes(operation) ? "" : "(" + hexadecimal(mask) + ")");
}

std::string waiting_text(const Thread& thread) {
  switch (thread.status) {
    case Thread::Status::kExited: return "has exited";
    case Thread::Status::kAtBlock: return std::string("waits at ") + name_of(thread.block_operation);
    case Thread::Status::kAtWarp:
    case Thread::Status::kAtBarrier: return "waits at " + call_text(thread, thread.warp_operation);
    case Thread::Status::kReady: break;
  }
  return "runs";
}

std::uint64_t count_of(const Index3& extent) {
  return static_cast<std::uint64_t>(extent.x) * extent.y * extent.z;
}

void record_failure(Worker& worker, const Thread& thread, const std::string& what, const void* caller) {
  Machine& machine = *worker.machine;
  worker.failed = true;
  const std::lock_guard<std::mutex> lock(machine.mutex);
  if (worker.place >= machine.failed_at.load()) {
    return;
  }
  machine.failed_at.store(worker.place);
  const std::string line = symbols().source_line(caller);
  machine.failure = machine.kernel + ": block " + text(worker.position) + " thread " + text(thread.position) + " " +
                    what + (line.empty() ? "" : " (" + line + ")");
}

void yield(Thread& thread) {
  ++thread.worker->counts.switches;
  switch_context(thread.context, thread.worker->scheduler);
}

bool is_at(const Thread& thread, WarpOperation operation, unsigned mask) {
  return thread.status == Thread::Status::kAtWarp && thread.warp_operation == operation && thread.mask == mask;
}

// Matrices are spread over all 32 lanes, barriers count whole warps, and the hardware does without none of them.
void complete_all_lanes(Thread& thread, unsigned present) {
  Worker& worker = *thread.worker;
  Warp& warp = *thread.warp;
  Thread* const lanes = &worker.threads[warp.first];
  if (present != ~0u) {
    const auto missing = static_cast<unsigned>(__builtin_ctz(~present));
    const Thread& first = lanes[__builtin_ctz(present)];
    record_failure(worker, first,
                   "calls " + call_text(first, first.warp_operation) + ", for which lane " +
                       std::to_string(missing) + " is needed, which " +
                       (missing < warp.lanes ? "has exited" : "the block does not have"),
                   first.caller);
    return;
  }
  if (is_of_barriers(thread.warp_operation)) {
    worker.come_to_barrier(warp, thread.warp_operation);
    return;
  }
  exchange_matrices(worker, warp, thread.warp_operation);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    lanes[lane].status = Thread::Status::kReady;
  }
  warp.waiting = 0;
}

Clocks joined(const Clocks& a, const Clocks& b) {
  if (a == nullptr || b == nullptr || a == b) {
    return a == nullptr ? b : a;
  }
  std::vector<std::uint32_t> both = *a;
  include(both, b);
  return std::make_shared<const std::vector<std::uint32_t>>(std::move(both));
}

// Lets `thread` and the lanes it waits for go on, if they are all there.
void try_to_complete(Thread& thread) {
  Worker& worker = *thread.worker;
  Warp& warp = *thread.warp;
  const WarpOperation operation = thread.warp_operation;
  const unsigned mask = thread.mask;
  Thread* const lanes = &worker.threads[warp.first];
  unsigned present = 0, ballot = 0;
  for (unsigned lane = 0; lane < warp.lanes; ++lane) {
    if ((mask >> lane & 1) == 0 || lanes[lane].status == Thread::Status::kExited) {
      continue;
    }
    if (!is_at(lanes[lane], operation, mask)) {
      return;
    }
    present |= 1u << lane;
    ballot |= (lanes[lane].value != 0 ? 1u : 0u) << lane;
  }

  if (is_of_all_lanes(operation)) {
    complete_all_lanes(thread, present);
    return;
  }

  std::array<std::uint64_t, kWarp> results{};
  for (unsigned lane = 0; lane < warp.lanes; ++lane) {
    if ((present >> lane & 1) == 0) {
      continue;
    }
    const Thread& reader = lanes[lane];
    const unsigned width = static_cast<unsigned>(reader.width), argument = static_cast<unsigned>(reader.argument);
    const unsigned first = width == 0 ? 0 : lane & ~(width - 1);
    unsigned source = lane;
    switch (operation) {
      case WarpOperation::kSync: break;
      case WarpOperation::kShuffle: source = first + (argument & (width - 1)); break;
      case WarpOperation::kShuffleUp: source = argument > lane - first ? lane : lane - argument; break;
      case WarpOperation::kShuffleDown: source = argument >= width - (lane - first) ? lane : lane + argument; break;
      case WarpOperation::kShuffleXor: source = (lane ^ argument) >= first + width ? lane : lane ^ argument; break;
      case WarpOperation::kBallot: results[lane] = ballot; continue;
      case WarpOperation::kAny: results[lane] = ballot != 0; continue;
      case WarpOperation::kAll: results[lane] = ballot == present; continue;
      default: break;
    }
    if ((present >> source & 1) == 0) {
      const bool exists = source < warp.lanes;
      const char* const why = (mask >> source & 1) == 0 ? ", which is not in the mask"
                              : exists                  ? ", which has exited"
                                                        : ", which the block does not have";
      record_failure(worker, reader,
                     "reads lane " + std::to_string(source) + " in " + call_text(operation, mask) + why,
                     reader.caller);
      return;
    }
    results[lane] = lanes[source].value;
  }

  // Everything these lanes did is now in the past of all of them.
  std::array<std::uint32_t, kWarp> seen{}, fenced{};
  bool any_fence = false;
  std::vector<Known> known;
  Clocks others, fenced_others;
  const bool barriers = worker.barrier_epoch != 0;
  const std::uint32_t clock = ++warp.counter;
  for (unsigned lane = 0; lane < warp.lanes; ++lane) {
    if ((present >> lane & 1) == 0) {
      continue;
    }
    const Thread& one = lanes[lane];
    const bool fence = worker.fenced && one.fence_epoch == worker.epoch;
    any_fence = any_fence || fence;
    for (unsigned other = 0; other < kWarp; ++other) {
      seen[other] = std::max(seen[other], one.seen[other]);
      fenced[other] = fence ? std::max(fenced[other], one.fence_seen[other]) : fenced[other];
    }
    if (worker.learned) {
      merge(known, one.known);
    }
    if (barriers) {
      others = joined(others, one.others);
      fenced_others = fence ? joined(fenced_others, one.fence_others) : fenced_others;
    }
  }
  for (unsigned lane = 0; lane < warp.lanes; ++lane) {
    seen[lane] = (present >> lane & 1) != 0 ? clock - 1 : seen[lane];
  }
  for (unsigned lane = 0; lane < warp.lanes; ++lane) {
    if ((present >> lane & 1) == 0) {
      continue;
    }
    Thread& one = lanes[lane];
    one.seen = seen;
    one.clock = clock;
    one.value = results[lane];
    one.status = Thread::Status::kReady;
    --warp.waiting;
    if (any_fence) {
      one.fence_epoch = worker.epoch;
      one.fence_seen = fenced;
    }
    if (worker.learned) {
      one.known = known;
    }
    if (barriers) {
      one.others = others;
      one.fence_others = any_fence ? fenced_others : one.fence_others;
    }
  }
}

void finish(Thread& thread) {
  Worker& worker = *thread.worker;
  thread.status = Thread::Status::kExited;
  Thread* const lanes = &worker.threads[thread.warp->first];
  for (unsigned lane = 0; thread.warp->waiting > 0 && lane < thread.warp->lanes && !worker.failed; ++lane) {
    if (lanes[lane].status == Thread::Status::kAtWarp) {
      try_to_complete(lanes[lane]);
    }
  }
}

// Where every fiber begins.
void enter() {
  Thread& thread = *running;
  const Launch& launch = *thread.worker->machine->launch;
  launch.invoke(launch.kernel, launch.arguments);
  running = nullptr;
  if (!thread.copies.empty()) {
    const Copy& copy = thread.copies.front();
    fail(thread, "ends without having waited for its copy to " + place_of(thread, copy.to), copy.caller);
  }
  finish(thread);
  yield(thread);
  __builtin_unreachable();
}

template <typename Order>
void shuffle(Order& order, std::size_t size, std::uint64_t seed) {
  order.resize(size);
  std::iota(order.begin(), order.end(), 0);
  if (seed != 0) {
    std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
  }
}

}  // namespace

std::string call_text(const Thread& thread, WarpOperation operation) {
  return is_of_barriers(operation) ? std::string(name_of(operation)) + "(" + std::to_string(thread.argument) + ", " +
                                         std::to_string(thread.width) + ")"
                                   : call_text(operation, thread.mask);
}

std::string text(const Index3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

Index3 position_of(std::uint64_t index, const Index3& extent) {
  return {static_cast<unsigned>(index % extent.x), static_cast<unsigned>(index / extent.x % extent.y),
          static_cast<unsigned>(index / extent.x / extent.y)};
}

void fail(Thread& thread, const std::string& what, const void* caller) {
  running = nullptr;
  record_failure(*thread.worker, thread, what, caller);
  yield(thread);
  __builtin_unreachable();
}

namespace {

std::string lacking(const NamedBarrier& barrier) {
  return barrier.call + ", to which only " + std::to_string(__builtin_popcount(barrier.phase.warps) * kWarp) +
         " threads come";
}

}  // namespace

// Workers

Worker::Worker() = default;

Worker::~Worker() {
  for (Shadow* shadow : shared_shadows) {
    Shadow::destroy(shadow);
  }
  Shadow::destroy(dynamic_shadow);
  if (dynamic_memory != nullptr) {
    munmap(dynamic_memory, kMostSharedBytes + 2 * kGuardBytes);
  }
}

void Worker::start(Machine& of) {
  machine = &of;
  const Launch& launch = *of.launch;
  stacks.reserve(of.block_threads);
  threads.resize(of.block_threads);
  warps.resize((of.block_threads + kWarp - 1) / kWarp);

  static const std::string kConstants = "constant memory", kArguments = "the kernel's arguments",
                           kDynamic = "dynamic shared memory";
  const Symbols& own = symbols();
  regions = buffer_regions();
  for (const AddressRange& range : own.constants) {
    regions.push_back({range.begin, range.end, nullptr, Region::Kind::kConstant, &kConstants});
  }
  const auto arguments = reinterpret_cast<std::uintptr_t>(launch.arguments);
  regions.push_back({arguments, arguments + launch.argument_bytes, nullptr, Region::Kind::kConstant, &kArguments});
  const std::uintptr_t shared = reinterpret_cast<std::uintptr_t>(&thread_local_marker) - own.marker_offset;
  for (std::size_t i = 0; i < own.shared.size(); ++i) {
    const SharedVariable& variable = own.shared[i];
    if (shared_shadows.size() <= i) {
      shared_shadows.push_back(Shadow::make(variable.bytes, /*global=*/false));
    }
    const std::uintptr_t begin = shared + variable.offset;
    regions.push_back({begin, begin + variable.bytes, shared_shadows[i], Region::Kind::kShared, &variable.name});
  }
  if (launch.dynamic_shared_bytes > 0) {
    if (dynamic_memory == nullptr) {
      void* const memory = mmap(nullptr, kMostSharedBytes + 2 * kGuardBytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) {
        throw std::bad_alloc();
      }
      dynamic_memory = static_cast<char*>(memory);
      dynamic_shadow = Shadow::make(kMostSharedBytes, /*global=*/false);
    }
    const auto begin = reinterpret_cast<std::uintptr_t>(dynamic_memory) + kGuardBytes;
    regions.push_back({begin, begin + launch.dynamic_shared_bytes, dynamic_shadow, Region::Kind::kShared, &kDynamic});
  }
  std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  recent.fill(nullptr);
}

void Worker::run_blocks() {
  for (;;) {
    place = machine->next.fetch_add(1);
    // Blocks before one that failed still run, so that the same failure is reported however many run at once.
    if (place >= machine->blocks || place > machine->failed_at.load()) {
      return;
    }
    run_block(machine->order[place]);
  }
}

void Worker::run_block(std::uint64_t block_index) {
  const Launch& launch = *machine->launch;
  number = machine->first_number + static_cast<std::uint32_t>(block_index);
  position = position_of(block_index, launch.grid);
  epoch = 1;
  fenced = learned = failed = false;
  fences = nullptr;
  known.clear();
  copies = 0;
  if (barrier_epoch != 0) {
    barriers = {};
  }
  barrier_epoch = 0;
  readers.clear();
  free_readers.clear();
  ++counts.blocks;
  const std::uint64_t seed = settings().order == 0 ? 0 : settings().order + block_index + 1;
  shuffle(warp_order, warps.size(), seed);
  shuffle(lane_order, kWarp, seed);
  for (unsigned w = 0; w < warps.size(); ++w) {
    warps[w] = {w * kWarp, std::min(kWarp, machine->block_threads - w * kWarp), 0, 1};
  }
  for (unsigned i = 0; i < threads.size(); ++i) {
    Thread& thread = threads[i];
    thread.worker = this;
    thread.warp = &warps[i / kWarp];
    thread.stack_low = reinterpret_cast<std::uintptr_t>(stacks.low(i));
    thread.stack_high = reinterpret_cast<std::uintptr_t>(stacks.high(i));
    thread.position = position_of(i, launch.block);
    thread.index = i;
    thread.lane = i % kWarp;
    thread.status = Thread::Status::kReady;
    thread.clock = 1;
    thread.seen.fill(0);
    thread.others = thread.fence_others = nullptr;
    thread.fence_epoch = 0;
    thread.touches = 0;
    thread.known.clear();
    thread.copies.clear();
    thread.groups.clear();
    prepare(thread.context, stacks.low(i), stacks.high(i), enter);
  }

  bool over = false;
  while (!over) {
    for (const unsigned w : warp_order) {
      bool any = true;
      while (any) {
        any = false;
        for (const unsigned lane : lane_order) {
          if (lane >= warps[w].lanes || threads[warps[w].first + lane].status != Thread::Status::kReady) {
            continue;
          }
          Thread& thread = threads[warps[w].first + lane];
          any = true;
          running = &thread;
          switch_context(scheduler, thread.context);
          running = nullptr;
          if (failed) {
            return;
          }
        }
      }
    }
    if (barrier_epoch == epoch && std::any_of(threads.begin(), threads.end(), [](const Thread& thread) {
          return thread.status == Thread::Status::kReady;
        })) {
      continue;  // a named barrier let them go
    }
    over = std::all_of(threads.begin(), threads.end(),
                       [](const Thread& thread) { return thread.status == Thread::Status::kExited; });
    if (!over) {
      const Thread* culprit = nullptr;
      const std::string problem = deadlock(&culprit);
      if (culprit != nullptr) {
        record_failure(*this, *culprit, problem, culprit->caller);
        return;
      }
      pass_barrier();
    }
  }
  for (const NamedBarrier& barrier : barriers) {
    if (barrier.threads != 0) {
      record_failure(*this, *barrier.first, "calls " + lacking(barrier) + ": the block ends", barrier.caller);
      return;
    }
  }
  for (const Thread& thread : threads) {
    counts.accesses += thread.touches;
  }
}

// Why not all threads wait at the same barrier, and which thread to say it of.
std::string Worker::deadlock(const Thread** of) const {
  for (const Thread& thread : threads) {
    if (thread.status != Thread::Status::kAtWarp) {
      continue;
    }
    for (unsigned lane = 0; lane < thread.warp->lanes; ++lane) {
      const Thread& other = threads[thread.warp->first + lane];
      if ((thread.mask >> lane & 1) != 0 && other.status != Thread::Status::kExited &&
          !is_at(other, thread.warp_operation, thread.mask)) {
        *of = &thread;
        return waiting_text(thread) + " for thread " + text(other.position) + ", which " + waiting_text(other) +
               ": deadlock";
      }
    }
  }
  for (const Thread& thread : threads) {
    if (thread.status == Thread::Status::kAtBarrier) {
      *of = &thread;
      return waiting_text(thread) + ", to which only " +
             std::to_string(__builtin_popcount(barriers[thread.argument].phase.warps) * kWarp) +
             " threads come: deadlock";
    }
  }
  const auto first = std::find_if(threads.begin(), threads.end(), [](const Thread& thread) {
    return thread.status == Thread::Status::kAtBlock;
  });
  std::size_t count = 0;
  const Thread* stray = nullptr;
  for (const Thread& thread : threads) {
    if (thread.status != Thread::Status::kAtBlock || thread.block_operation != first->block_operation) {
      stray = stray == nullptr ? &thread : stray;
      ++count;
    }
  }
  if (stray == nullptr) {
    return "";
  }
  *of = &*first;
  return waiting_text(*first) + ", where " + std::to_string(count) + " of " + std::to_string(threads.size()) +
         " threads do not come: thread " + text(stray->position) + " " + waiting_text(*stray) + ": divergent barrier";
}

void Worker::pass_barrier() {
  std::uint64_t count = 0;
  for (const Thread& thread : threads) {
    count += thread.value != 0 ? 1 : 0;
  }
  const BlockOperation operation = threads[0].block_operation;
  const std::uint64_t result = operation == BlockOperation::kOr      ? count > 0
                               : operation == BlockOperation::kAnd   ? count == threads.size()
                               : operation == BlockOperation::kCount ? count
                                                                     : 0;
  if (learned) {
    for (Thread& thread : threads) {
      merge(known, thread.known);
      thread.known.clear();
    }
    learned = false;
  }
  if (fenced) {
    auto all = std::make_shared<Release>();
    all->block = number;
    all->epoch = epoch;
    all->clocks.assign(threads.size(), 0);
    all->known = known;
    for (const Thread& thread : threads) {
      for (unsigned lane = 0; thread.fence_epoch == epoch && lane < thread.warp->lanes; ++lane) {
        std::uint32_t& clock = all->clocks[thread.warp->first + lane];
        clock = std::max(clock, thread.fence_seen[lane]);
      }
      if (thread.fence_epoch == epoch) {
        include(all->clocks, thread.fence_others);
      }
    }
    fences = std::move(all);
    fenced = false;
  }
  ++epoch;
  readers.clear();
  free_readers.clear();
  for (Thread& thread : threads) {
    thread.others = nullptr;  // everything is known now
    thread.value = result;
    thread.status = Thread::Status::kReady;
  }
}

std::uint32_t Worker::keep(const Readers& one) {
  if (free_readers.empty()) {
    readers.push_back(one);
    return static_cast<std::uint32_t>(readers.size() - 1);
  }
  const std::uint32_t index = free_readers.back();
  free_readers.pop_back();
  readers[index] = one;
  return index;
}

// A warp comes with all lanes: its accesses so far get clocks that are over for whoever leaves the barrier.
void Worker::come_to_barrier(Warp& warp, WarpOperation operation) {
  Thread* const lanes = &threads[warp.first];
  const Thread& first = lanes[0];
  const unsigned own = warp.first / kWarp, bit = 1u << own;
  const auto refuse = [&](const std::string& why) {
    record_failure(*this, first, "calls " + call_text(first, operation) + why, first.caller);
  };
  for (unsigned lane = 1; lane < kWarp; ++lane) {
    if (lanes[lane].argument != first.argument || lanes[lane].width != first.width) {
      refuse(", and lane " + std::to_string(lane) + " of its warp calls " + call_text(lanes[lane], operation));
      return;
    }
  }
  NamedBarrier& barrier = barriers[static_cast<std::size_t>(first.argument)];
  if (barrier.threads != 0 && barrier.threads != first.width) {
    refuse(", and thread " + text(barrier.first->position) + " calls " + barrier.call);
    return;
  }
  if ((barrier.phase.warps & bit) != 0) {
    refuse(", to which it has come before, and others have not come yet");
    return;
  }
  if (barrier_epoch != epoch) {  // so that clocks from now on are later than those so far, of all warps
    std::uint32_t latest = 0;
    for (const Warp& one : warps) {
      latest = std::max(latest, one.counter);
    }
    for (Warp& one : warps) {
      one.counter = latest;
    }
    barrier_epoch = epoch;
  }

  std::vector<std::uint32_t> seen(threads.size(), 0), fenced(threads.size(), 0);
  bool fence = false;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const Thread& one = lanes[lane];
    if (lane == 0 || one.others != lanes[lane - 1].others) {
      include(seen, one.others);
    }
    if (one.fence_epoch == epoch) {
      fence = true;
      include(fenced, one.fence_others);
      for (unsigned other = 0; other < kWarp; ++other) {
        std::uint32_t& clock = fenced[warp.first + other];
        clock = std::max(clock, one.fence_seen[other]);
      }
    }
    merge(barrier.known, one.known);
  }
  for (unsigned one = 0; one < warps.size(); ++one) {
    if ((barrier.before.warps >> one & 1) != 0 && one != own && barrier.before.epochs[one] == epoch &&
        seen[warps[one].first] < barrier.before.clocks[one]) {
      refuse(" again, and nothing has told it that thread " + text(threads[warps[one].first].position) +
             " came the time before: race");
      return;
    }
  }

  const std::uint32_t clock = warp.counter++;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    seen[warp.first + lane] = clock;
    lanes[lane].clock = warp.counter;
    lanes[lane].status = operation == WarpOperation::kBarrierSync ? Thread::Status::kAtBarrier : Thread::Status::kReady;
  }
  warp.waiting = 0;
  barrier.seen = joined(barrier.seen, std::make_shared<const std::vector<std::uint32_t>>(std::move(seen)));
  if (fence) {
    const Clocks all = barrier.fence_epoch == epoch ? barrier.fenced : nullptr;
    barrier.fenced = joined(all, std::make_shared<const std::vector<std::uint32_t>>(std::move(fenced)));
    barrier.fence_epoch = epoch;
  }
  if (barrier.threads == 0) {
    barrier.threads = first.width;
    barrier.first = &first;
    barrier.call = call_text(first, operation);
    barrier.caller = first.caller;
  }
  barrier.phase.warps |= bit;
  barrier.phase.epochs[own] = epoch;
  barrier.phase.clocks[own] = clock;
  barrier.waiting |= operation == WarpOperation::kBarrierSync ? bit : 0;
  if (__builtin_popcount(barrier.phase.warps) * static_cast<int>(kWarp) == barrier.threads) {
    complete(barrier);
  }
}

void Worker::complete(NamedBarrier& barrier) {
  learned = learned || !barrier.known.empty();
  for (unsigned index = 0; index < warps.size(); ++index) {
    for (unsigned lane = 0; (barrier.waiting >> index & 1) != 0 && lane < kWarp; ++lane) {
      Thread& one = threads[warps[index].first + lane];
      one.others = barrier.seen;
      std::copy_n(barrier.seen->begin() + warps[index].first, kWarp, one.seen.begin());
      if (barrier.fence_epoch == epoch) {
        one.fence_epoch = epoch;
        one.fence_others = barrier.fenced;
        std::copy_n(barrier.fenced->begin() + warps[index].first, kWarp, one.fence_seen.begin());
      }
      merge(one.known, barrier.known);
      one.status = Thread::Status::kReady;
    }
  }
  NamedBarrier next;
  next.before = barrier.phase;
  barrier = std::move(next);
}

// Launches

Settings& settings() {
  static Settings instance;
  return instance;
}

namespace {

std::mutex launch_mutex;
std::uint32_t next_number = 1;
Counts total;

std::vector<std::unique_ptr<Worker>>& workers() {
  static std::vector<std::unique_ptr<Worker>> instance;
  return instance;
}

void check_shape(const Launch& launch, const std::string& kernel) {
  const Index3 &grid = launch.grid, &block = launch.block;
  const auto refuse = [&](const std::string& what) { throw KernelError(kernel + ": launched with " + what); };
  if (count_of(grid) == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid of " + text(grid) + " blocks; from 1 to 2147483647 x 65535 x 65535 can be");
  }
  if (count_of(block) == 0 || count_of(block) > kMostThreads || block.x > 1024 || block.y > 1024 || block.z > 64) {
    refuse("blocks of " + text(block) + " threads; from 1 to 1024 can be, at most 64 of them in z");
  }
  if (launch.dynamic_shared_bytes > kMostSharedBytes) {
    refuse(std::to_string(launch.dynamic_shared_bytes) + " bytes of dynamic shared memory; no GPU has more than " +
           std::to_string(kMostSharedBytes));
  }
  if (count_of(grid) > std::numeric_limits<std::uint32_t>::max() / 4) {
    refuse("a grid of " + text(grid) + " blocks, more than the emulator can number");
  }
}

}  // namespace

void run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  Machine machine;
  machine.launch = &launch;
  machine.kernel = symbols().kernel_name(launch.kernel);
  check_shape(launch, machine.kernel);
  machine.block_threads = static_cast<unsigned>(count_of(launch.block));
  machine.blocks = count_of(launch.grid);
  machine.first_number = next_number;
  if (machine.blocks > std::numeric_limits<std::uint32_t>::max() - next_number) {
    throw KernelError(machine.kernel + ": the emulator has run out of numbers for blocks; start another process");
  }
  next_number += static_cast<std::uint32_t>(machine.blocks);
  shuffle(machine.order, machine.blocks, settings().order);
  const auto count = static_cast<std::size_t>(
      std::min<std::uint64_t>(static_cast<std::uint64_t>(std::max(settings().threads, 1)), machine.blocks));
  machine.parallel = count > 1;
  while (workers().size() < count) {
    workers().push_back(std::make_unique<Worker>());
  }
  const auto work = [&machine](Worker& worker) {
    worker.start(machine);
    worker.run_blocks();
  };
  std::vector<std::thread> threads;
  std::exception_ptr problem;
  const auto guarded = [&](Worker& worker) {
    try {
      work(worker);
    } catch (...) {
      const std::lock_guard<std::mutex> problem_lock(machine.mutex);
      problem = std::current_exception();
    }
  };
  for (std::size_t i = 1; i < count; ++i) {
    threads.emplace_back(guarded, std::ref(*workers()[i]));
  }
  guarded(*workers()[0]);
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (std::size_t i = 0; i < count; ++i) {
    Counts& counts = workers()[i]->counts;
    total.accesses += counts.accesses;
    total.switches += counts.switches;
    total.blocks += counts.blocks;
    counts = {};
  }
  if (problem) {
    std::rethrow_exception(problem);
  }
  if (!machine.failure.empty()) {
    throw KernelError(machine.failure);
  }
}

Counts take_counts() {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  const Counts result = total;
  total = {};
  return result;
}

std::vector<std::string> unguarded_shared_variables() { return symbols().unguarded; }

// The device language

Index3 thread_index() noexcept { return running->position; }
unsigned lane_index() noexcept { return running->lane; }
Index3 block_index() noexcept { return running->worker->position; }
Index3 block_extent() noexcept { return running->worker->machine->launch->block; }
Index3 grid_extent() noexcept { return running->worker->machine->launch->grid; }

void* dynamic_shared() noexcept {
  char* const memory = running->worker->dynamic_memory;
  return memory == nullptr ? nullptr : memory + kGuardBytes;
}

int block_barrier(BlockOperation operation, int predicate) {
  const Paused thread;
  thread->status = Thread::Status::kAtBlock;
  thread->block_operation = operation;
  thread->value = predicate != 0;
  thread->caller = __builtin_return_address(0);
  yield(*thread);
  return static_cast<int>(thread->value);
}

void wait_for_warp(Thread& thread, WarpOperation operation, unsigned mask, const void* caller) {
  thread.status = Thread::Status::kAtWarp;
  thread.warp_operation = operation;
  thread.mask = mask;
  thread.caller = caller;
  ++thread.warp->waiting;
  try_to_complete(thread);
  if (thread.status != Thread::Status::kReady || thread.worker->failed) {
    yield(thread);
  }
}

std::uint64_t warp_operation(WarpOperation operation, unsigned mask, std::uint64_t value, int argument, int width) {
  const Paused thread;
  const void* const caller = __builtin_return_address(0);
  if ((mask >> thread->lane & 1) == 0) {
    fail(*thread, "calls " + call_text(operation, mask) + " and is not in the mask", caller);
  }
  thread->value = value;
  thread->argument = argument;
  thread->width = width;
  wait_for_warp(*thread, operation, mask, caller);
  return thread->value;
}

void fence() {
  const Paused thread;
  thread->fence_epoch = thread->worker->epoch;
  thread->fence_seen = thread->seen;
  thread->fence_others = thread->others;
  thread->fence_seen[thread->lane] = thread->clock;
  thread->clock = ++thread->warp->counter;
  thread->worker->fenced = true;
}

void trap() {
  const Paused thread;
  fail(*thread, "traps", __builtin_return_address(0));
}

}  // namespace efficientad_fast::simt

// Called where an instrumented function begins, on its own frame.
extern "C" void __tsan_func_entry(void* caller) {
  using namespace efficientad_fast::simt;
  Thread* const thread = running;
  if (thread != nullptr && reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0)) < thread->stack_low) {
    fail(*thread, "needs more than " + std::to_string(Stacks::kBytes) + " bytes of local memory", caller);
  }
}
