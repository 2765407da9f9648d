// The scheduler behind cuda_runtime.h. Compiled without the sanitizer, which must see the kernels' memory alone, and
// learns here who waits for whom.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#ifdef SHIM_TSAN
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

namespace shim {
namespace {

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr unsigned kNoSync = 1;  // a switch of fibers orders nothing

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "cuda shim: %s\n", message.c_str());
  std::_Exit(70);
}

// Whoever comes last opens it. `two` lets the sanitizer tell one use from the next.
struct Barrier {
  int waiting = 0, uses = 0, members = 0;
  const char* file = nullptr;
  int line = 0;
  char two[2];
};

struct Fiber {
  ucontext_t context;
  void* sanitizer;
  char* stack;
  bool done;
  Indices indices;
  int shuffles = 0, counted = 0;
};

struct Warp {
  Barrier barrier;
  std::uint64_t slots[2][32];  // alternating: a lane may be one exchange ahead
};

std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
std::vector<Warp> warps;
Barrier block;
char ends[2];
int counts[3];
std::int64_t progress = 0;  // barriers opened, threads ended
ucontext_t scheduler;
void* scheduler_sanitizer;
Fiber* current;
const std::function<void()>* kernel;

void yield() {
  Fiber* self = current;
  __tsan_switch_to_fiber(scheduler_sanitizer, kNoSync);
  swapcontext(&self->context, &scheduler);
}

// `orders`: memory, as a barrier does; a shuffle only waits.
void wait(Barrier& barrier, bool orders) {
  const int use = barrier.uses;
  if (orders) __tsan_release(&barrier.two[use % 2]);
  if (++barrier.waiting == barrier.members) {
    barrier.waiting = 0;
    ++barrier.uses;
    ++progress;
  }
  while (barrier.uses == use) yield();
  if (orders) __tsan_acquire(&barrier.two[use % 2]);
}

Warp& warp() { return warps[current->indices.thread.x / 32]; }

void enter() {
  Fiber* self = current;
  __tsan_acquire(&ends[0]);
  (*kernel)();
  __tsan_release(&ends[1]);
  self->done = true;
  ++progress;
  yield();
}

}  // namespace

const Indices& indices() { return current->indices; }
int lane() { return current->indices.thread.x % 32; }

void sync_block(const char* file, int line) {
  // "file.cuh:12" in the environment takes that barrier out, for the tests of the tests.
  static const char* const skipped = std::getenv("SHIM_SKIP_BARRIER");
  if (skipped != nullptr) {
    const std::string here = std::string(file) + ":" + std::to_string(line);
    static bool told = false;
    if (here.ends_with(skipped)) {
      if (!told) std::fprintf(stderr, "cuda shim: skips %s\n", skipped);
      told = true;
      return;
    }
  }
  if (block.waiting > 0 && (block.file != file || block.line != line)) {
    fail("threads of a block wait at different barriers, " + std::string(file) + ":" + std::to_string(line));
  }
  block.file = file;
  block.line = line;
  wait(block, true);
}

void sync_warp() { wait(warp().barrier, true); }

int count_block(int predicate, const char* file, int line) {
  const int turn = current->counted++ % 3;
  counts[turn] += predicate != 0;
  sync_block(file, line);
  counts[(turn + 2) % 3] = 0;  // the last one, which all have read
  return counts[turn];
}

std::uint64_t exchange(std::uint64_t word, int source) {
  Warp& mine = warp();
  const int turn = current->shuffles++ % 2;
  mine.slots[turn][lane()] = word;
  wait(mine.barrier, false);
  return mine.slots[turn][source];
}

unsigned ballot(bool predicate) {
  unsigned bits = 0;
  Warp& mine = warp();
  const int turn = current->shuffles++ % 2;
  mine.slots[turn][lane()] = predicate;
  wait(mine.barrier, false);
  for (int other = 0; other < 32; ++other) bits |= static_cast<unsigned>(mine.slots[turn][other]) << other;
  return bits;
}

void run(dim3 blocks, dim3 threads, const std::function<void()>& body) {
  if (threads.x % 32 != 0 || threads.x == 0 || threads.x > 1024)
    fail("a block must be whole warps, up to 1024 threads");
  scheduler_sanitizer = __tsan_get_current_fiber();
  kernel = &body;
  while (fibers.size() < threads.x) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    fiber->sanitizer = __tsan_create_fiber(0);
    fibers.push_back(std::move(fiber));
  }
  for (unsigned index = 0; index < blocks.x; ++index) {
    block = Barrier{.members = static_cast<int>(threads.x)};
    std::fill(counts, counts + 3, 0);
    warps.assign(threads.x / 32, Warp{.barrier = {.members = 32}});
    for (unsigned thread = 0; thread < threads.x; ++thread) {
      Fiber& fiber = *fibers[thread];
      fiber.done = false;
      fiber.shuffles = fiber.counted = 0;
      fiber.indices = {dim3(thread, 0, 0), dim3(index, 0, 0), threads, blocks};
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
    __tsan_release(&ends[0]);
    for (unsigned alive = threads.x; alive > 0;) {
      const std::int64_t before = progress;
      alive = 0;
      for (unsigned thread = 0; thread < threads.x; ++thread) {
        if (fibers[thread]->done) continue;
        ++alive;
        current = fibers[thread].get();
        __tsan_switch_to_fiber(current->sanitizer, kNoSync);
        swapcontext(&scheduler, &current->context);
      }
      if (progress == before && alive > 0) fail("threads wait for others that will not come");
    }
    __tsan_acquire(&ends[1]);
  }
  current = nullptr;
}

}  // namespace shim
