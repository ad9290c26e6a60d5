// Judges every load and store: bounds, permission, initialisation, order.

#include "machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace efficientad_fast::simt {

// Buffers

struct Memory {
  static std::vector<const Buffer*>& all() {
    static std::vector<const Buffer*> buffers;
    return buffers;
  }
  static Region region(const Buffer& buffer) {
    return {buffer.begin_, buffer.begin_ + buffer.bytes_, buffer.shadow_, Region::Kind::kGlobal, &buffer.name_};
  }
};

namespace {

std::mutex buffers_mutex;

constexpr std::uint8_t kSeen = 0xff;

std::size_t words_of(std::size_t bytes) { return bytes / 4 + 2; }  // one more for a beginning inside a word

std::uintptr_t first_word(const Region& region) { return region.begin & ~std::uintptr_t{3}; }

}  // namespace

Shadow* Shadow::make(std::size_t bytes, bool global) {
  const std::size_t words = words_of(bytes);
  const std::size_t cells = words * 4 * sizeof(Cell), under_way = global ? 0 : words * sizeof(UnderWay);
  const std::size_t split = words, written = global ? words * 4 : 0;
  auto* const shadow = new Shadow;
  shadow->mapping_bytes = cells + under_way + split + written;
  shadow->mapping = mmap(nullptr, shadow->mapping_bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);  // zero where it was never touched
  if (shadow->mapping == MAP_FAILED) {
    delete shadow;
    throw std::bad_alloc();
  }
  auto* const memory = static_cast<std::uint8_t*>(shadow->mapping);
  shadow->first = reinterpret_cast<Cell*>(memory);
  shadow->rest = shadow->first + words;
  shadow->under_way = global ? nullptr : reinterpret_cast<UnderWay*>(memory + cells);
  shadow->split = memory + cells + under_way;
  shadow->written = global ? memory + cells + split : nullptr;
  return shadow;
}

void Shadow::destroy(Shadow* shadow) {
  if (shadow != nullptr) {
    munmap(shadow->mapping, shadow->mapping_bytes);
    delete shadow;
  }
}

Buffer::Buffer(std::string name, void* host, std::size_t bytes, bool writable, bool initialised)
    : name_(std::move(name)), host_(host), bytes_(bytes), writable_(writable) {
  if (!writable && !initialised) {
    throw std::invalid_argument("simt: buffer " + name_ + " is neither initialised nor writable");
  }
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(host) % 16;
  const std::size_t used = (misaligned + bytes + page - 1) / page * page;
  const std::size_t gap = std::max<std::size_t>(1 << 20, used);  // an index twice too large still hits nothing else
  reserved_bytes_ = used + 2 * gap;
  reserved_ = mmap(nullptr, reserved_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved_ == MAP_FAILED) {
    throw std::bad_alloc();
  }
  char* const begin = static_cast<char*>(reserved_) + gap;
  mprotect(begin, used, PROT_READ | PROT_WRITE);
  begin_ = reinterpret_cast<std::uintptr_t>(begin) + misaligned;
  if (initialised && bytes > 0) {
    std::memcpy(begin + misaligned, host, bytes);
  } else {
    std::memset(begin, 0xcb, used);
  }
  if (writable) {
    shadow_ = Shadow::make(bytes, /*global=*/true);
    if (initialised) {
      std::memset(shadow_->written, kSeen, words_of(bytes) * 4);
    }
  }
  const std::lock_guard<std::mutex> lock(buffers_mutex);
  Memory::all().push_back(this);
}

Buffer::~Buffer() {
  {
    const std::lock_guard<std::mutex> lock(buffers_mutex);
    auto& all = Memory::all();
    all.erase(std::find(all.begin(), all.end(), this));
  }
  Shadow::destroy(shadow_);
  munmap(reserved_, reserved_bytes_);
}

void Buffer::download() const {
  if (!writable_) {
    return;
  }
  const std::uint8_t* const written = shadow_->written + begin_ % 4;
  for (std::size_t i = 0; i < bytes_; ++i) {
    if (written[i] != 0) {
      static_cast<char*>(host_)[i] = as<char>()[i];
    }
  }
}

std::size_t Buffer::unwritten() const {
  if (!writable_) {
    return 0;
  }
  const std::uint8_t* const written = shadow_->written + begin_ % 4;
  return static_cast<std::size_t>(std::count(written, written + bytes_, std::uint8_t{0}));
}

std::vector<Region> buffer_regions() {
  const std::lock_guard<std::mutex> lock(buffers_mutex);
  std::vector<Region> regions;
  for (const Buffer* buffer : Memory::all()) {
    regions.push_back(Memory::region(*buffer));
  }
  return regions;
}

// Order

namespace {

// Whether what thread `thread` of a block did at a clock of an epoch is included in `release`.
bool includes(const Release& release, std::uint32_t block, std::uint32_t epoch, unsigned thread, std::uint32_t clock) {
  return release.block == block &&
         (epoch < release.epoch || (epoch == release.epoch && clock <= release.clocks[thread]));
}

// Looks at every release that is known, or was known to one that is, once.
template <typename Predicate>
bool any_release(const std::vector<Known>& known, std::vector<Known>& searched, const Predicate& predicate) {
  for (const Known& one : known) {
    auto before = std::find_if(searched.begin(), searched.end(),
                               [&](const Known& other) { return other.releases == one.releases; });
    const std::size_t first = before == searched.end() ? 0 : before->count;
    if (first >= one.count) {
      continue;
    }
    if (before == searched.end()) {
      searched.push_back(one);
    } else {
      before->count = one.count;
    }
    for (std::size_t i = first; i < one.count; ++i) {
      const Release& release = *one.releases->list[i];
      if (predicate(release) || any_release(release.known, searched, predicate)) {
        return true;
      }
    }
  }
  return false;
}

template <typename Predicate>
bool knows(const Thread& thread, const Predicate& predicate) {
  Machine& machine = *thread.worker->machine;
  if (!machine.any_release.load(std::memory_order_relaxed)) {
    return false;
  }
  const std::lock_guard<std::mutex> lock(machine.releases_mutex);
  std::vector<Known> searched;
  return any_release(thread.known, searched, predicate) || any_release(thread.worker->known, searched, predicate);
}

bool knows(const Thread& thread, std::uint32_t block, std::uint32_t epoch, unsigned other, std::uint32_t clock) {
  return knows(thread, [&](const Release& release) { return includes(release, block, epoch, other, clock); });
}

enum class Verdict : std::uint8_t { kFine, kUnwritten, kAfterWrite, kAfterAtomic, kAfterRead };

// The rules for one access by one thread, for a byte at a time.
struct Judge {
  const Thread& thread;
  Worker& worker;
  const Access access;
  const bool shared;

  Verdict judge(Cell& cell) const {
    const std::uint32_t number = worker.number;
    if (shared && reads(access) && cell.write.block != number && cell.atomic.block != number) {
      return Verdict::kUnwritten;
    }
    if (!after(cell.write)) {
      return Verdict::kAfterWrite;
    }
    if (access == Access::kAtomicRead) {
      return Verdict::kFine;
    }
    if (!is_atomic(access) && !after(cell.atomic)) {
      return Verdict::kAfterAtomic;
    }
    if (access == Access::kRead) {
      note_read(cell);
      return Verdict::kFine;
    }
    if (!after_reads(cell)) {
      return Verdict::kAfterRead;
    }
    const Touch own{number, worker.epoch, thread.clock, thread.index};
    if (is_atomic(access)) {
      cell.atomic = own;  // of several that nothing orders, the last stands for all
    } else {
      cell.write = own;
      cell.atomic.block = 0;
    }
    forget_readers(cell);
    cell.read.block = 0;
    cell.read.warp = 0;
    return Verdict::kFine;
  }

  // Whether its readers are in the worker's `readers`.
  bool are_apart(const Cell& cell) const {
    return cell.read.warp == Cell::kApart && cell.read.block == worker.number && cell.read.epoch == worker.epoch;
  }

 private:
  // Shared memory forgets other blocks; global memory forgets other launches.
  bool forgotten(std::uint32_t block) const {
    return shared ? block != worker.number : block < worker.machine->first_number;
  }

  // Whether a clock of another thread of the block is over.
  bool sees(unsigned other, std::uint32_t clock) const {
    return other / kWarp == thread.index / kWarp ? thread.seen[other % kWarp] >= clock
                                                 : thread.others != nullptr && (*thread.others)[other] >= clock;
  }

  bool after(const Touch& touch) const {
    if (forgotten(touch.block)) {
      return true;
    }
    if (touch.block == worker.number) {
      if (touch.epoch != worker.epoch || touch.thread == thread.index) {
        return true;
      }
      if (sees(touch.thread, touch.clock)) {
        return true;
      }
    }
    return knows(thread, touch.block, touch.epoch, touch.thread, touch.clock);
  }

  bool after_reads(const Cell& cell) const {
    if (forgotten(cell.read.block)) {
      return true;
    }
    if (cell.read.warp == Cell::kSeveralBlocks) {
      return after_several_blocks(cell);
    }
    const bool same_block = cell.read.block == worker.number;
    if (same_block && cell.read.epoch != worker.epoch) {
      return true;
    }
    if (cell.read.warp == Cell::kSeveralWarps || cell.read.warp == Cell::kApart) {
      if (same_block && after_several_warps(cell)) {
        return true;
      }
      return knows(thread, [&](const Release& r) { return r.block == cell.read.block && r.epoch > cell.read.epoch; });
    }
    const bool same_warp = same_block && cell.read.warp == thread.index / kWarp;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if ((cell.read.lanes >> lane & 1) == 0 || (same_warp && lane == thread.lane)) {
        continue;
      }
      if (!(same_block && sees(cell.read.warp * kWarp + lane, cell.read.clock)) &&
          !knows(thread, cell.read.block, cell.read.epoch, cell.read.warp * kWarp + lane, cell.read.clock)) {
        return false;
      }
    }
    return true;
  }

  // Of this epoch. Of warps that are not kept apart which lanes is not known.
  bool after_several_warps(const Cell& cell) const {
    const Readers* const readers = are_apart(cell) ? &worker.readers[cell.read.lanes] : nullptr;
    for (unsigned warp = 0; thread.others != nullptr && warp < worker.warps.size(); ++warp) {
      const bool any = readers != nullptr || (cell.read.lanes >> warp & 1) != 0;
      const std::uint32_t lanes = !any ? 0 : readers != nullptr ? readers->lanes[warp] : ~0u;
      const std::uint32_t clock = readers != nullptr ? readers->clocks[warp] : cell.read.clock;
      for (unsigned lane = 0; lanes != 0 && lane < worker.warps[warp].lanes; ++lane) {
        const unsigned other = warp * kWarp + lane;
        if ((lanes >> lane & 1) != 0 && other != thread.index && !sees(other, clock)) {
          return false;
        }
      }
    }
    return thread.others != nullptr;
  }

  // Which blocks is not kept, so every other block of the launch must have released its reads.
  bool after_several_blocks(const Cell& cell) const {
    const Machine& machine = *worker.machine;
    for (std::uint64_t i = 0; i < machine.blocks; ++i) {
      const std::uint32_t block = machine.first_number + static_cast<std::uint32_t>(i);
      const auto in_time = [&](std::uint32_t clock) { return cell.read.clock <= clock; };
      const auto released = [&](const Release& r) {
        if (r.block != block || r.epoch != cell.read.epoch) {
          return r.block == block && r.epoch > cell.read.epoch;
        }
        return cell.read.lanes == Cell::kSeveralThreads ? std::all_of(r.clocks.begin(), r.clocks.end(), in_time)
                                                        : in_time(r.clocks[cell.read.lanes]);
      };
      if (block != worker.number && !knows(thread, released)) {
        return false;
      }
    }
    return true;
  }

  void note_read(Cell& cell) const {
    auto& read = cell.read;
    const std::uint32_t warp = thread.index / kWarp, bit = 1u << thread.lane;
    const bool own_block = read.block == worker.number && read.warp != Cell::kSeveralBlocks;
    if (own_block && read.epoch == worker.epoch) {
      const bool later = read.warp == warp ? read.clock < thread.clock : thread.others != nullptr;
      if (later && after_reads(cell)) {  // whoever comes after this one comes after those
        forget_readers(cell);
        read = {worker.number, worker.epoch, thread.clock, bit, warp};
      } else if (read.warp == warp) {
        read.lanes |= bit;
        read.clock = std::max(read.clock, thread.clock);
      } else {
        note_several_warps(cell, warp, bit);
      }
    } else if (own_block || after_reads(cell)) {
      read = {worker.number, worker.epoch, thread.clock, bit, warp};
    } else {
      std::uint32_t before = Cell::kSeveralThreads;
      if (read.warp == Cell::kSeveralBlocks) {
        before = read.lanes;
      } else if (read.warp < kWarp && (read.lanes & (read.lanes - 1)) == 0) {
        before = read.warp * kWarp + static_cast<unsigned>(__builtin_ctz(read.lanes));
      }
      read = {worker.number, std::max(read.epoch, worker.epoch), std::max(read.clock, thread.clock),
              before == thread.index ? before : Cell::kSeveralThreads, Cell::kSeveralBlocks};
    }
  }

  void forget_readers(const Cell& cell) const {
    if (are_apart(cell)) {
      worker.free_readers.push_back(cell.read.lanes);
    }
  }

  // Where nobody has come to a named barrier in this epoch, no clock of it can be known to another warp without all
  // others: one clock and a bit for every warp are enough.
  void note_several_warps(Cell& cell, std::uint32_t warp, std::uint32_t bit) const {
    auto& read = cell.read;
    if (worker.barrier_epoch != worker.epoch) {
      read.lanes = (read.warp == Cell::kSeveralWarps ? read.lanes : 1u << read.warp) | 1u << warp;
      read.warp = Cell::kSeveralWarps;
    } else {
      if (read.warp != Cell::kApart) {
        Readers readers{};
        for (unsigned one = 0; one < kWarp; ++one) {
          const bool among = read.warp == Cell::kSeveralWarps && (read.lanes >> one & 1) != 0;
          readers.lanes[one] = read.warp == one ? read.lanes : among ? ~0u : 0;
          readers.clocks[one] = readers.lanes[one] != 0 ? read.clock : 0;
        }
        read.warp = Cell::kApart;
        read.lanes = worker.keep(readers);
      }
      Readers& readers = worker.readers[read.lanes];
      readers.lanes[warp] |= bit;
      readers.clocks[warp] = std::max(readers.clocks[warp], thread.clock);
    }
    read.clock = std::max(read.clock, thread.clock);
  }
};

// One at a time touches a cell of global memory.
class CellLock {
 public:
  CellLock(bool needed, std::uintptr_t address) {
    if (needed) {
      lock_ = &locks[address / 64 % locks.size()];
      while (lock_->exchange(true, std::memory_order_acquire)) {
      }
    }
  }
  ~CellLock() {
    if (lock_ != nullptr) {
      lock_->store(false, std::memory_order_release);
    }
  }
  CellLock(const CellLock&) = delete;
  CellLock& operator=(const CellLock&) = delete;

 private:
  static std::array<std::atomic<bool>, 1024> locks;
  std::atomic<bool>* lock_ = nullptr;
};
std::array<std::atomic<bool>, 1024> CellLock::locks{};

const Region* find(Worker& worker, std::uintptr_t address) {
  const auto& regions = worker.regions;
  const auto after = std::upper_bound(regions.begin(), regions.end(), address,
                                      [](std::uintptr_t a, const Region& region) { return a < region.begin; });
  return after == regions.begin() ? nullptr : &*(after - 1);
}

// Sentences

std::string verb(Access access, std::size_t bytes) {
  const char* what = access == Access::kRead ? "reads " : access == Access::kWrite ? "writes " : "updates ";
  return what + std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes") +
         (access == Access::kRead || access == Access::kWrite ? "" : " atomically");
}

std::string place(const Region& region, std::uintptr_t address) {
  return " at " + *region.name + " + " + std::to_string(address - region.begin);
}

[[noreturn]] void fail_bounds(Thread& thread, std::uintptr_t address, std::size_t bytes, Access access,
                              const void* caller) {
  const std::string what = verb(access, bytes);
  for (const Thread& other : thread.worker->threads) {
    if (address >= other.stack_low && address < other.stack_high) {
      fail(thread, what + " of a local variable of thread " + text(other.position), caller);
    }
  }
  const Region* nearest = nullptr;
  std::uintptr_t least = std::uintptr_t{1} << 40;
  for (const Region& region : thread.worker->regions) {
    if (region.kind == Region::Kind::kConstant) {
      continue;
    }
    const std::uintptr_t end = address + bytes;
    const std::uintptr_t distance = address < region.begin ? region.begin - address
                                    : end > region.end     ? end - region.end
                                                           : 0;
    if (distance < least) {
      least = distance;
      nearest = &region;
    }
  }
  if (address < 65536) {
    fail(thread, what + " at address " + std::to_string(address) + ", behind a null pointer", caller);
  }
  // Farther away than its size and a margin, a buffer has nothing to do with it.
  if (nearest == nullptr || least > std::max<std::uintptr_t>(nearest->end - nearest->begin, 65536) + (1 << 20)) {
    fail(thread, what + " where no buffer and no shared memory is", caller);
  }
  const std::string size = std::to_string(nearest->end - nearest->begin);
  if (address < nearest->begin) {
    const std::string before = std::to_string(nearest->begin - address);
    fail(thread, what + " at " + *nearest->name + " - " + before + ", " + before + " bytes before its begin", caller);
  }
  if (address < nearest->end) {
    fail(thread, what + place(*nearest, address) + ", across its end of " + size, caller);
  }
  const std::string past = std::to_string(address - nearest->end);
  fail(thread, what + place(*nearest, address) + ", " + past + " bytes past its end of " + size, caller);
}

[[noreturn]] void fail_verdict(Thread& thread, const Region& region, std::uintptr_t address, std::size_t bytes,
                               Access access, const Cell& cell, Verdict verdict, const void* caller) {
  const Worker& worker = *thread.worker;
  const std::string what = verb(access, bytes) + place(region, address) + ", which ";
  if (verdict == Verdict::kUnwritten) {
    fail(thread, what + "nothing has written", caller);
  }
  if (verdict == Verdict::kAfterRead && cell.read.warp == Cell::kSeveralBlocks) {
    fail(thread, what + "other blocks read, and nothing orders the blocks: race", caller);
  }
  const Touch& touch = verdict == Verdict::kAfterAtomic ? cell.atomic : cell.write;
  std::uint32_t block = touch.block, other = touch.thread;
  std::string who;
  if (verdict == Verdict::kAfterRead) {
    block = cell.read.block;
    const bool own_warp = block == worker.number && cell.read.warp == thread.index / kWarp;
    const std::uint32_t lanes = cell.read.lanes & ~(own_warp ? 1u << thread.lane : 0);
    other = cell.read.warp * kWarp + static_cast<unsigned>(__builtin_ctz(lanes | 1u << 31));
  }
  if (block != worker.number) {
    who = "block " + text(position_of(block - worker.machine->first_number, worker.machine->launch->grid)) + " ";
  }
  if (verdict == Verdict::kAfterRead && cell.read.warp >= Cell::kApart) {
    who += "threads of several warps";
  } else {
    who += "thread " + text(position_of(other, worker.machine->launch->block));
  }
  const char* const did = verdict == Verdict::kAfterRead     ? " read"
                          : verdict == Verdict::kAfterAtomic ? " updated atomically"
                                                             : " wrote";
  const char* const why = block != worker.number ? ", and nothing orders the blocks" : " with no barrier in between";
  fail(thread, what + who + did + why + ": race", caller);
}

[[noreturn]] void fail_under_way(Thread& thread, const Region& region, std::uintptr_t address, std::size_t bytes,
                                 Access access, std::uint32_t other, const void* caller) {
  const Index3& block = thread.worker->machine->launch->block;
  const std::string who = other == thread.index ? "it" : "thread " + text(position_of(other, block));
  fail(thread,
       verb(access, bytes) + place(region, address) + ", where a copy is under way that " + who +
           " has not waited for: race",
       caller);
}

// A thread that touches memory more often is taken to wait for another for ever.
constexpr std::uint64_t kMostTouches = std::uint64_t{1} << 24;

}  // namespace

void touch(Thread& thread, std::uintptr_t address, std::size_t bytes, Access access, const void* caller) {
  if (bytes == 0) {
    return;
  }
  Worker& worker = *thread.worker;
  if (++thread.touches > kMostTouches) {
    fail(thread, "does not end: it has touched memory more than " + std::to_string(kMostTouches) + " times", caller);
  }
  if (address >= thread.stack_low && address < thread.stack_high) {
    return;
  }
  const Region*& recent = worker.recent[address / 4096 % Worker::kRecent];
  const Region* region = recent;
  if (region == nullptr || address < region->begin || address >= region->end) {
    region = find(worker, address);
    if (region == nullptr) {
      fail_bounds(thread, address, bytes, access, caller);
    }
    recent = region;
  }
  if (address < region->begin || address + bytes > region->end) {
    fail_bounds(thread, address, bytes, access, caller);
  }
  if (region->shadow == nullptr) {
    if (writes(access)) {
      fail(thread, verb(access, bytes) + place(*region, address) + ", which is read-only", caller);
    }
    return;
  }

  Shadow& shadow = *region->shadow;
  const bool global = region->kind == Region::Kind::kGlobal;
  const std::size_t offset = address - first_word(*region);
  if (global) {
    std::uint8_t* const written = shadow.written + offset;
    for (std::size_t i = 0; reads(access) && i < bytes; ++i) {
      if (written[i] == 0) {
        fail_verdict(thread, *region, address, bytes, access, {}, Verdict::kUnwritten, caller);
      }
    }
    for (std::size_t i = 0; writes(access) && i < bytes; ++i) {
      written[i] = kSeen;
    }
  }

  const Judge rules{thread, worker, access, !global};
  Verdict verdict = Verdict::kFine;
  const Cell* culprit = nullptr;
  std::size_t at = offset;
  const std::size_t end = offset + bytes;
  for (std::size_t word = at / 4; !global && worker.copies > 0 && word * 4 < end; ++word) {
    const UnderWay& copy = shadow.under_way[word];
    if (copy.block == worker.number) {
      fail_under_way(thread, *region, address, bytes, access, copy.thread, caller);
    }
  }
  while (at < end && verdict == Verdict::kFine) {
    const CellLock lock(global && worker.machine->parallel, address - offset + at);
    const std::size_t word = at / 4;
    const bool whole = at % 4 == 0 && end - at >= 4;
    if (whole && shadow.split[word] == 0) {
      culprit = &shadow.first[word];
      verdict = rules.judge(shadow.first[word]);
      at += 4;
      continue;
    }
    if (shadow.split[word] == 0) {
      for (std::size_t byte = 1; byte < 4; ++byte) {
        Cell& cell = shadow.cell(word, byte) = shadow.first[word];
        if (rules.are_apart(cell)) {
          cell.read.lanes = worker.keep(Readers(worker.readers[cell.read.lanes]));
        }
      }
      shadow.split[word] = 1;
    }
    const std::size_t stop = std::min(end, word * 4 + 4);
    for (; at < stop && verdict == Verdict::kFine; ++at) {
      Cell& cell = shadow.cell(word, at % 4);
      culprit = &cell;
      verdict = rules.judge(cell);
    }
    if (whole && verdict == Verdict::kFine && access == Access::kWrite) {
      shadow.split[word] = 0;
    }
  }
  if (verdict != Verdict::kFine) {
    fail_verdict(thread, *region, address, bytes, access, *culprit, verdict, caller);
  }
}

// Copies

namespace {

template <typename Action>
void for_words(Thread& thread, const Copy& copy, const Action& action) {
  const auto address = reinterpret_cast<std::uintptr_t>(copy.to);
  const Region& region = *find(*thread.worker, address);
  const std::size_t first = (address - first_word(region)) / 4;
  for (std::size_t word = first; word < first + copy.bytes / 4; ++word) {
    action(region.shadow->under_way[word]);
  }
}

}  // namespace

void mark_under_way(Thread& thread, const Copy& copy) {
  ++thread.worker->copies;
  for_words(thread, copy, [&](UnderWay& word) { word = {thread.worker->number, thread.index}; });
}

void clear_under_way(Thread& thread, const Copy& copy) {
  --thread.worker->copies;
  for_words(thread, copy, [](UnderWay& word) { word = {0, 0}; });
}

std::string place_of(Thread& thread, const void* pointer) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (address >= thread.stack_low && address < thread.stack_high) {
    return "a local variable";
  }
  const Region* const region = find(*thread.worker, address);
  const bool inside = region != nullptr && address < region->end;
  return inside ? *region->name + " + " + std::to_string(address - region->begin) : std::to_string(address);
}

void require_aligned(Thread& thread, const void* pointer, std::size_t bytes, const char* what, const void* caller) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0) {
    fail(thread,
         what + (" " + place_of(thread, pointer)) + ", whose address is not a multiple of " + std::to_string(bytes),
         caller);
  }
}

void require_kind(Thread& thread, const void* pointer, Region::Kind kind, const char* what, const void* caller) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const Region* const region = find(*thread.worker, address);
  const bool own = address >= thread.stack_low && address < thread.stack_high;
  if (own || (region != nullptr && address < region->end && region->kind != kind)) {
    fail(thread,
         what + (" " + place_of(thread, pointer)) + ", which is not " +
             (kind == Region::Kind::kGlobal ? "global" : "shared") + " memory",
         caller);
  }
}

void fail_alignment(Thread& thread, std::uintptr_t address, std::size_t bytes, Access access, const void* caller) {
  const Region* const region = find(*thread.worker, address);
  const bool inside = region != nullptr && address < region->end;
  fail(thread,
       verb(access, bytes) + (inside ? place(*region, address) : " at " + std::to_string(address)) +
           ", whose address is not a multiple of " + std::to_string(bytes),
       caller);
}

// Fences and atomics

void merge(std::vector<Known>& into, const std::vector<Known>& from) {
  for (const Known& one : from) {
    const auto same = std::find_if(into.begin(), into.end(),
                                   [&](const Known& other) { return other.releases == one.releases; });
    if (same == into.end()) {
      into.push_back(one);
    } else {
      same->count = std::max(same->count, one.count);
    }
  }
}

void include(std::vector<std::uint32_t>& into, const Clocks& clocks) {
  for (std::size_t i = 0; clocks != nullptr && i < into.size(); ++i) {
    into[i] = std::max(into[i], (*clocks)[i]);
  }
}

// That whoever takes over passes a fence too is not asked for.
void release_and_learn(Thread& thread, std::uintptr_t address, bool releases) {
  Worker& worker = *thread.worker;
  Machine& machine = *worker.machine;
  releases = releases && (thread.fence_epoch != 0 || worker.fences != nullptr);
  if (!releases && !machine.any_release.load(std::memory_order_relaxed)) {
    return;
  }
  const std::lock_guard<std::mutex> lock(machine.releases_mutex);
  std::vector<Known> before = worker.known;
  merge(before, thread.known);
  auto& entry = machine.releases[address];
  if (entry == nullptr) {
    entry = std::make_unique<Releases>();
  }
  if (!entry->list.empty()) {
    merge(thread.known, {{entry.get(), entry->list.size()}});
    worker.learned = true;
  }
  if (!releases) {
    return;
  }
  machine.any_release.store(true, std::memory_order_relaxed);
  if (worker.fences != nullptr && (entry->list.empty() || entry->list.back() != worker.fences)) {
    entry->list.push_back(worker.fences);
  }
  if (thread.fence_epoch != 0) {
    auto own = std::make_shared<Release>();
    own->block = worker.number;
    own->epoch = thread.fence_epoch;
    own->clocks.assign(machine.block_threads, 0);
    for (unsigned lane = 0; lane < thread.warp->lanes; ++lane) {
      own->clocks[thread.warp->first + lane] = thread.fence_seen[lane];
    }
    include(own->clocks, thread.fence_others);
    own->known = std::move(before);
    entry->list.push_back(std::move(own));
  }
}

}  // namespace efficientad_fast::simt
