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

// A job's tasks are dealt out in ranges, one a thread, so that a thread's tasks are neighbours in memory; who is done
// takes from the others. A range is one number, so that a thread that comes late cannot take a task of one job for
// a task of another: 16 bits of the job's number, 24 of the range's end, 24 of the next task.
constexpr int kBits = 24;
constexpr int64_t kMask = (int64_t(1) << kBits) - 1;
constexpr int64_t next_of(uint64_t range) { return (int64_t)(range & (uint64_t)kMask); }
constexpr int64_t end_of(uint64_t range) { return (int64_t)(range >> kBits & (uint64_t)kMask); }

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
    if (helpers < 1 || busy_.exchange(true, std::memory_order_acquire)) {
      for (int64_t i = 0; i < count; ++i) task(context, i);
      return;
    }
    for (int64_t first = 0; first < count; first += kMask / 2) {
      const int64_t part = count - first < kMask / 2 ? count - first : kMask / 2;
      share(part, first, task, context, helpers);
    }
    busy_.store(false, std::memory_order_release);
  }

 private:
  void share(int64_t count, int64_t first, void (*task)(void*, int64_t), void* context, int helpers) {
    start(helpers);
    task_ = task;
    context_ = context;
    first_ = first;
    done_.store(0, std::memory_order_relaxed);
    const int64_t parts = helpers + 1;
    parts_.store((int)parts, std::memory_order_relaxed);
    const uint64_t job = (epoch_.load(std::memory_order_relaxed) + 1) & 0xffff;
    for (int64_t part = 0; part < parts; ++part) {
      const uint64_t begin = (uint64_t)(count * part / parts), end = (uint64_t)(count * (part + 1) / parts);
      ranges_[part].state.store(job << (2 * kBits) | end << kBits | begin, std::memory_order_release);
    }
    // Sequentially consistent, as is what a worker does before it sleeps: one of the two sees the other.
    epoch_.fetch_add(1);
    if (sleeping_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    work(0);
    // What is left is at most one task a thread; if one has lost its core, it is given ours.
    for (int spins = 0; done_.load(std::memory_order_acquire) < count; ++spins) {
      if (spins < 4096) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  // Take the tasks of one's own range, then those of the others.
  void work(int self) {
    const int parts = parts_.load(std::memory_order_relaxed);
    for (int i = 0; i < parts; ++i) {
      std::atomic<uint64_t>& range = ranges_[(self + i) % parts].state;
      for (;;) {
        const uint64_t seen = range.load(std::memory_order_relaxed);
        if (next_of(seen) >= end_of(seen)) break;
        const uint64_t mine = range.fetch_add(1, std::memory_order_acquire);
        if (next_of(mine) >= end_of(mine)) break;
        // The job cannot end, nor its fields change, before this task of it is done.
        task_(context_, first_ + next_of(mine));
        done_.fetch_add(1, std::memory_order_release);
      }
    }
  }

  void start(int helpers) {
    for (; started_ < helpers; ++started_) {
      try {
        std::thread([this, index = started_] { loop(index + 1); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: those there are do the work
      }
    }
  }

  void loop(int self) {
    for (uint32_t seen = 0;;) {
      const auto since = Clock::now();
      bool fresh = false;
      while (!fresh && Clock::now() - since < kSpin) {
        for (int i = 0; i < 32 && !fresh; ++i) {
          fresh = epoch_.load() != seen;
          if (!fresh) pause();
        }
      }
      if (!fresh) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        sleeping_.fetch_sub(1);
      }
      seen = epoch_.load();
      if (self < parts_.load(std::memory_order_relaxed)) work(self);
    }
  }

  std::atomic<bool> busy_{false};
  std::atomic<int> wanted_{1};
  // Each on a cache line of its own: they are written by all threads.
  struct alignas(64) Range {
    std::atomic<uint64_t> state{0};
  };
  Range ranges_[kMostThreads];
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<int> parts_{0};
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t first_ = 0;
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
