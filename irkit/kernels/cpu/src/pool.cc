#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace irkit {
namespace {

using Clock = std::chrono::steady_clock;

// A worker looks for work this long before it sleeps: longer than the pauses within a step, much shorter than
// anything a person or another program would notice.
constexpr auto kSpin = std::chrono::microseconds(200);
constexpr int kMostThreads = 256;

// The state of the current job in one number, so that a thread that comes late cannot take a task of one job for
// a task of another: 16 bits of the job's number, 24 of its tasks, 24 of those taken.
constexpr int kBits = 24;
constexpr uint64_t kMask = (uint64_t(1) << kBits) - 1;
constexpr uint64_t taken(uint64_t state) { return state & kMask; }
constexpr uint64_t count_of(uint64_t state) { return state >> kBits & kMask; }

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void set_threads(int wanted) {
    wanted_.store(wanted < 1 ? 1 : wanted > kMostThreads ? kMostThreads : wanted, std::memory_order_relaxed);
  }
  int threads() const { return wanted_.load(std::memory_order_relaxed); }

  void run(int64_t count, void (*task)(void*, int64_t), void* context) {
    const int helpers = (int)(threads() < count ? threads() : count) - 1;
    if (helpers < 1 || !busy_.try_lock()) {
      for (int64_t i = 0; i < count; ++i) task(context, i);
      return;
    }
    for (int64_t first = 0; first < count; first += (int64_t)kMask / 2) {
      const int64_t part = count - first < (int64_t)kMask / 2 ? count - first : (int64_t)kMask / 2;
      share(part, first, task, context, helpers);
    }
    busy_.unlock();
  }

 private:
  void share(int64_t count, int64_t first, void (*task)(void*, int64_t), void* context, int helpers) {
    start(helpers);
    task_ = task;
    context_ = context;
    first_ = first;
    done_.store(0, std::memory_order_relaxed);
    helpers_.store(helpers, std::memory_order_relaxed);
    job_ = (job_ + 1) & 0xffff;
    // Sequentially consistent, as is what a worker does before it sleeps: one of the two sees the other.
    state_.store(job_ << (2 * kBits) | (uint64_t)count << kBits);
    if (sleeping_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    work();
    // What is left is at most one task a thread; if one has lost its core, it is given ours.
    for (int spins = 0; done_.load(std::memory_order_acquire) < count; ++spins) {
      if (spins < 4096) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  // Take tasks until none is left.
  void work() {
    for (;;) {
      const uint64_t seen = state_.load(std::memory_order_relaxed);
      if (taken(seen) >= count_of(seen)) return;
      const uint64_t mine = state_.fetch_add(1, std::memory_order_acquire);
      if (taken(mine) >= count_of(mine)) return;
      // The job cannot end, nor its fields change, before this task of it is done.
      task_(context_, first_ + (int64_t)taken(mine));
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  bool waiting(int index) const {
    const uint64_t seen = state_.load();
    return taken(seen) < count_of(seen) && index < helpers_.load(std::memory_order_relaxed);
  }

  void start(int helpers) {
    for (; started_ < helpers; ++started_) {
      try {
        std::thread([this, index = started_] { loop(index); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: those there are do the work
      }
    }
  }

  void loop(int index) {
    for (;;) {
      work_if(index);
      const auto since = Clock::now();
      bool found = false;
      while (!found && Clock::now() - since < kSpin) {
        for (int i = 0; i < 32 && !found; ++i) {
          found = waiting(index);
          if (!found) pause();
        }
      }
      if (found) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_.fetch_add(1);
      wake_.wait(lock, [&] { return waiting(index); });
      sleeping_.fetch_sub(1);
    }
  }

  void work_if(int index) {
    if (waiting(index)) work();
  }

  std::mutex busy_;
  std::atomic<int> wanted_{1};
  // Each on a cache line of its own: they are written by all threads.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> helpers_{0};
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t first_ = 0;
  uint64_t job_ = 0;
  int started_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
};

// Never destroyed: its threads run until the process ends.
Pool& pool() {
  static Pool* const made = new Pool;
  return *made;
}

}  // namespace

void set_threads(int threads) { pool().set_threads(threads); }
int threads() { return pool().threads(); }
void run(int64_t count, void (*task)(void*, int64_t), void* context) { pool().run(count, task, context); }

}  // namespace irkit
