// Asynchronous copies, and the matrices that a warp holds.

#include "machine.h"
#include "numbers.h"

#include <cstring>

namespace efficientad_fast::simt {

// Copies

// Shared memory is written when it is waited for. Until then nobody may touch it: what it held must have been read by
// now, and whoever reads it afterwards must be ordered after the wait.
void copy_async(void* shared, const void* global, unsigned bytes, bool taken) {
  const Paused thread;
  const void* const caller = __builtin_return_address(0);
  require_aligned(*thread, shared, bytes, "copies to", caller);
  require_aligned(*thread, global, bytes, "copies from", caller);
  require_kind(*thread, shared, Region::Kind::kShared, "copies to", caller);
  Copy copy{static_cast<char*>(shared), taken ? global : nullptr, bytes, {}, caller};
  if (taken) {
    require_kind(*thread, global, Region::Kind::kGlobal, "copies from", caller);
    touch(*thread, reinterpret_cast<std::uintptr_t>(global), bytes, Access::kRead, caller);
    std::memcpy(copy.content.data(), global, bytes);
  }
  touch(*thread, reinterpret_cast<std::uintptr_t>(shared), bytes, Access::kWrite, caller);
  mark_under_way(*thread, copy);
  thread->copies.push_back(copy);
}

void commit_copies() {
  const Paused thread;
  std::size_t count = thread->copies.size();
  for (const std::size_t group : thread->groups) {
    count -= group;
  }
  thread->groups.push_back(count);
}

void wait_for_copies(unsigned pending) {
  const Paused thread;
  const void* const caller = __builtin_return_address(0);
  if (thread->groups.size() <= pending) {
    return;
  }
  const auto groups_end = thread->groups.end() - pending;
  std::size_t count = 0;
  for (auto group = thread->groups.begin(); group != groups_end; ++group) {
    count += *group;
  }
  thread->groups.erase(thread->groups.begin(), groups_end);
  for (std::size_t i = 0; i < count; ++i) {
    const Copy& copy = thread->copies[i];
    if (copy.from != nullptr && std::memcmp(copy.from, copy.content.data(), copy.bytes) != 0) {
      fail(*thread, "has copied from " + place_of(*thread, copy.from) + ", which changed on the way: race",
           copy.caller);
    }
    clear_under_way(*thread, copy);
    touch(*thread, reinterpret_cast<std::uintptr_t>(copy.to), copy.bytes, Access::kWrite, caller);
    std::memcpy(copy.to, copy.content.data(), copy.bytes);
  }
  thread->copies.erase(thread->copies.begin(), thread->copies.begin() + static_cast<std::ptrdiff_t>(count));
}

// Matrices

namespace {

// A row counts as read by the lane that gives its address, and its words by the lanes that get them.
void load(Thread* lanes, unsigned matrices) {
  for (unsigned matrix = 0; matrix < matrices; ++matrix) {
    for (unsigned row = 0; row < 8; ++row) {
      Thread& giver = lanes[matrix * 8 + row];
      const auto address = static_cast<std::uintptr_t>(giver.value);
      const void* const pointer = reinterpret_cast<const void*>(address);
      require_aligned(giver, pointer, 16, "loads a row of a matrix from", giver.caller);
      require_kind(giver, pointer, Region::Kind::kShared, "loads a row of a matrix from", giver.caller);
      touch(giver, address, 16, Access::kRead, giver.caller);
      for (unsigned word = 0; word < 4; ++word) {
        Thread& receiver = lanes[row * 4 + word];
        if (&receiver != &giver) {
          touch(receiver, address + word * 4, 4, Access::kRead, receiver.caller);
        }
        std::memcpy(&receiver.registers[matrix], reinterpret_cast<const char*>(address) + word * 4, 4);
      }
    }
  }
}

template <WarpOperation kOperation>
float number(std::uint32_t word, unsigned index) {
  if constexpr (kOperation == WarpOperation::kMultiplyFloat16) {
    return float_from_half(static_cast<std::uint16_t>(word >> 16 * index));
  } else if constexpr (kOperation == WarpOperation::kMultiplyBFloat16) {
    return float_from_bfloat16(static_cast<std::uint16_t>(word >> 16 * index));
  } else {
    return float_from_e4m3(static_cast<std::uint8_t>(word >> 8 * index));
  }
}

// To each sum are added, one after the other from the first, the products of its row and column.
template <WarpOperation kOperation>
void multiply(Thread* lanes) {
  constexpr unsigned kOfWord = kOperation == WarpOperation::kMultiplyE4m3 ? 4 : 2, kDepth = 8 * kOfWord;
  float left[16][kDepth], right[kDepth][8], sums[16][8];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const auto& registers = lanes[lane].registers;
    const unsigned group = lane / 4, within = lane % 4;
    for (unsigned i = 0; i < kOfWord; ++i) {
      for (unsigned k = 0; k < 4; ++k) {
        left[group + k % 2 * 8][(within + k / 2 * 4) * kOfWord + i] = number<kOperation>(registers[4 + k], i);
      }
      for (unsigned k = 0; k < 2; ++k) {
        right[(within + k * 4) * kOfWord + i][group] = number<kOperation>(registers[8 + k], i);
      }
    }
    for (unsigned k = 0; k < 4; ++k) {
      sums[group + k / 2 * 8][within * 2 + k % 2] = float_from(registers[k]);
    }
  }
  for (unsigned row = 0; row < 16; ++row) {
    for (unsigned k = 0; k < kDepth; ++k) {
      for (unsigned column = 0; column < 8; ++column) {
        sums[row][column] += left[row][k] * right[k][column];
      }
    }
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    for (unsigned k = 0; k < 4; ++k) {
      lanes[lane].registers[k] = float_bits(sums[lane / 4 + k / 2 * 8][lane % 4 * 2 + k % 2]);
    }
  }
}

}  // namespace

void exchange_matrices(Worker& worker, const Warp& warp, WarpOperation operation) {
  Thread* const lanes = &worker.threads[warp.first];
  switch (operation) {
    case WarpOperation::kLoadTwo: return load(lanes, 2);
    case WarpOperation::kLoadFour: return load(lanes, 4);
    case WarpOperation::kMultiplyFloat16: return multiply<WarpOperation::kMultiplyFloat16>(lanes);
    case WarpOperation::kMultiplyBFloat16: return multiply<WarpOperation::kMultiplyBFloat16>(lanes);
    default: return multiply<WarpOperation::kMultiplyE4m3>(lanes);
  }
}

Matrices load_matrices(WarpOperation operation, const void* row) {
  const Paused thread;
  thread->value = reinterpret_cast<std::uintptr_t>(row);
  wait_for_warp(*thread, operation, ~0u, __builtin_return_address(0));
  const auto& got = thread->registers;
  return {{got[0], got[1], got[2], got[3]}};
}

Sums multiply_add(WarpOperation operation, Sums sums, Matrices left, std::uint64_t right) {
  const Paused thread;
  std::memcpy(&thread->registers[0], &sums, sizeof(sums));
  std::memcpy(&thread->registers[4], &left, sizeof(left));
  std::memcpy(&thread->registers[8], &right, sizeof(right));
  wait_for_warp(*thread, operation, ~0u, __builtin_return_address(0));
  std::memcpy(&sums, thread->registers.data(), sizeof(sums));
  return sums;
}

// Barriers

void named_barrier(WarpOperation operation, int barrier, int threads) {
  const Paused thread;
  const void* const caller = __builtin_return_address(0);
  thread->argument = barrier;
  thread->width = threads;
  const auto refuse = [&](const std::string& why) {
    fail(*thread, "calls " + call_text(*thread, operation) + ", and " + why, caller);
  };
  if (barrier < 1 || barrier >= NamedBarrier::kCount) {
    refuse("barriers are 1 to 15");
  }
  if (threads < 1 || threads % static_cast<int>(kWarp) != 0) {
    refuse("threads come in whole warps of 32");
  }
  if (static_cast<unsigned>(threads) > thread->worker->threads.size()) {
    refuse("the block has " + std::to_string(thread->worker->threads.size()) + " threads");
  }
  wait_for_warp(*thread, operation, ~0u, caller);
}

}  // namespace efficientad_fast::simt
