// The part of Metal that the kernels use, for a CPU: types, functions, and threads in lockstep where
// Metal has them in lockstep.
//
// The threads of a threadgroup are fibers of one operating system thread. A fiber runs until it
// reaches a barrier or a simdgroup function, and goes on when all threads that must meet there have
// come. So a missing barrier shows as a difference between schedules (forward, backward, shuffled),
// and threads that wait at different places as an error. Threadgroup memory starts as NaN.
#ifndef METAL_SHIM_H
#define METAL_SHIM_H

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

using uint = unsigned int;
using ushort = unsigned short;

struct uint3 {
  uint x, y, z;
};

// Narrow floats: read as float, written by an explicit conversion, nearest even.
struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if (value != value) {
      bits = 0x7fc0;
    } else {
      bits = uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
    }
  }
  operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

struct float16_t {
  _Float16 value;
  float16_t() = default;
  explicit float16_t(float wide) : value(_Float16(wide)) {}
  operator float() const { return float(value); }
};
using half = float16_t;
using bfloat = bfloat16_t;

namespace metal_shim {

constexpr uint kLanes = 32;
constexpr size_t kStack = 1 << 16;

enum class Waits { kNot, kSimdgroup, kThreadgroup, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  bool started;
  Waits waits;
  uint place;   // the line that it waits at
  uint parity;  // which of two exchange slots its next simdgroup function uses
  float exchange[2];
  uint3 position_in_threadgroup, position_in_grid;
  uint index;
};

struct Group {
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  uint current;
  uint3 size, position;
  std::function<void()> body;
  uint32_t random;
};

inline Group group;

inline Fiber& self() { return group.fibers[group.current]; }

__attribute__((noinline)) inline void yield(Waits waits, uint place) {
  Fiber& fiber = self();
  fiber.waits = waits;
  fiber.place = place;
  if (_setjmp(fiber.state) == 0) _longjmp(group.scheduler, 1);
}

__attribute__((noinline)) inline void resume(uint index) {
  group.current = index;
  Fiber& fiber = group.fibers[index];
  fiber.waits = Waits::kNot;
  if (_setjmp(group.scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
}

inline void enter() {
  group.body();
  yield(Waits::kDone, 0);
}

// Whether fibers first .. first + count all wait for each other at one place; then lets them go.
inline bool release(uint first, uint count, Waits waits) {
  for (uint i = first; i < first + count; i++) {
    const Fiber& fiber = group.fibers[i];
    if (fiber.waits != waits || fiber.place != group.fibers[first].place) return false;
  }
  for (uint i = first; i < first + count; i++) group.fibers[i].waits = Waits::kNot;
  return true;
}

inline void shuffle(std::vector<uint>& order, uint32_t& random) {
  for (size_t i = order.size(); i > 1; i--) {
    random = random * 1664525u + 1013904223u;
    std::swap(order[i - 1], order[(random >> 8) % i]);
  }
}

// schedule: 0 forward, 1 backward, else a seed.
inline std::vector<uint> in_order(uint count, uint schedule, uint32_t& random) {
  std::vector<uint> order(count);
  for (uint i = 0; i < count; i++) order[i] = schedule == 1 ? count - 1 - i : i;
  if (schedule > 1) shuffle(order, random);
  return order;
}

// Runs one threadgroup; returns whether its threads met wherever they had to.
inline bool run_group(uint schedule) {
  const uint count = uint(group.fibers.size());
  for (Fiber& fiber : group.fibers) {
    fiber.started = false;
    fiber.waits = Waits::kNot;
    fiber.parity = 0;
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  while (true) {
    for (uint index : in_order(count, schedule, group.random)) {
      if (group.fibers[index].waits == Waits::kNot) resume(index);
    }
    bool going = release(0, count, Waits::kThreadgroup);
    for (uint first = 0; first < count; first += kLanes) {
      going |= release(first, kLanes, Waits::kSimdgroup);
    }
    if (going) continue;
    for (const Fiber& fiber : group.fibers) {
      if (fiber.waits != Waits::kDone) return false;
    }
    return true;
  }
}

// Runs `body` once for each thread of the grid. Returns 0, or 1 with a message.
inline int run(const uint* grid, const uint* threads, uint schedule, char* memory, size_t bytes,
               char* message, std::function<void()> body) {
  const uint3 size{threads[0], threads[1], threads[2]};
  const uint count = size.x * size.y * size.z;
  if (count == 0 || count % kLanes || count > 1024) {
    std::snprintf(message, 200, "a threadgroup of %u threads", count);
    return 1;
  }
  if (grid[0] % size.x || grid[1] % size.y || grid[2] % size.z) {
    std::snprintf(message, 200, "the grid is not a whole number of threadgroups");
    return 1;
  }
  group.size = size;
  group.body = std::move(body);
  group.random = schedule;
  group.fibers.resize(count);
  for (uint i = 0; i < count; i++) {
    Fiber& fiber = group.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.index = i;
    fiber.position_in_threadgroup = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
  }
  const uint3 groups{grid[0] / size.x, grid[1] / size.y, grid[2] / size.z};
  for (uint g : in_order(groups.x * groups.y * groups.z, schedule, group.random)) {
    group.position = {g % groups.x, g / groups.x % groups.y, g / (groups.x * groups.y)};
    for (Fiber& fiber : group.fibers) {
      const uint3 p = fiber.position_in_threadgroup;
      fiber.position_in_grid = {group.position.x * size.x + p.x, group.position.y * size.y + p.y,
                                group.position.z * size.z + p.z};
    }
    if (bytes) std::memset(memory, 0xff, bytes);
    if (!run_group(schedule)) {
      for (const Fiber& fiber : group.fibers) {
        if (fiber.waits == Waits::kDone) continue;
        std::snprintf(message, 200, "threads wait at different places: thread %u at line %u",
                      fiber.index, fiber.place);
        break;
      }
      return 1;
    }
  }
  return 0;
}

// Each lane gives a value; returns those of all lanes of its simdgroup.
inline const float* exchange(float value, float* all, uint place) {
  Fiber& fiber = self();
  const uint slot = fiber.parity;
  fiber.exchange[slot] = value;
  fiber.parity ^= 1;
  yield(Waits::kSimdgroup, place);
  const uint first = self().index / kLanes * kLanes;
  for (uint i = 0; i < kLanes; i++) all[i] = group.fibers[first + i].exchange[slot];
  return all;
}

inline uint lane() { return self().index % kLanes; }

// As neighbours add up in hardware; Metal leaves the order open.
inline float simd_sum(float value, uint place) {
  float all[kLanes];
  exchange(value, all, place);
  for (uint step = kLanes / 2; step > 0; step /= 2) {
    for (uint i = 0; i < step; i++) all[i] += all[i + step];
  }
  return all[0];
}

inline float simd_max(float value, uint place) {
  float all[kLanes];
  exchange(value, all, place);
  float largest = all[0];
  for (float other : all) largest = std::fmax(largest, other);
  return largest;
}

inline int simd_min(int value, uint place) {
  float as_float, all[kLanes];
  std::memcpy(&as_float, &value, 4);
  exchange(as_float, all, place);
  int smallest = value, other;
  for (uint i = 0; i < kLanes; i++) {
    std::memcpy(&other, &all[i], 4);
    if (other < smallest) smallest = other;
  }
  return smallest;
}

inline float simd_prefix_exclusive_sum(float value, uint place) {
  float all[kLanes], before = 0;
  exchange(value, all, place);
  for (uint i = 0; i < lane(); i++) before += all[i];
  return before;
}

inline float simd_broadcast(float value, uint from, uint place) {
  float all[kLanes];
  return exchange(value, all, place)[from];
}

}  // namespace metal_shim

namespace metal {

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline uint max(uint a, uint b) { return a > b ? a : b; }
inline uint min(uint a, uint b) { return a < b ? a : b; }

inline bool isfinite(float x) { return std::isfinite(x); }

namespace precise {
inline float exp(float x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
inline float tanh(float x) { return std::tanh(x); }
}  // namespace precise

}  // namespace metal

#define simd_sum(value) metal_shim::simd_sum(value, __LINE__)
#define simd_max(value) metal_shim::simd_max(value, __LINE__)
#define simd_min(value) metal_shim::simd_min(value, __LINE__)
#define simd_prefix_exclusive_sum(value) metal_shim::simd_prefix_exclusive_sum(value, __LINE__)
#define simd_broadcast(value, lane) metal_shim::simd_broadcast(value, lane, __LINE__)
#define threadgroup_barrier(flags) \
  metal_shim::yield(((void)(flags), metal_shim::Waits::kThreadgroup), __LINE__)

// Address spaces: one memory, but that of a threadgroup is gathered where it can be reset.
#define device
#define constant
#define threadgroup static __attribute__((section("threadgroup_memory")))
extern "C" char __start_threadgroup_memory[] __attribute__((weak));
extern "C" char __stop_threadgroup_memory[] __attribute__((weak));

#endif  // METAL_SHIM_H
