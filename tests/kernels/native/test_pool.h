// The pool of threads.
#pragma once

#include <chrono>
#include <thread>

#include "pool.h"
#include "support.h"

namespace {

// Every task runs once.
void check_tasks(int64_t count) {
  std::vector<std::atomic<int>> runs(count);
  parallel(count, [&](int64_t i) { runs[i].fetch_add(1, std::memory_order_relaxed); });
  for (int64_t i = 0; i < count; ++i)
    expect(runs[i] == 1, "pool: task %d of %d ran %d times", (int)i, (int)count, runs[i].load());
}

void test_pool() {
  for (int threads : {1, 2, 4, 3, 0, 300}) {
    set_threads(threads);
    for (int64_t count : {0, 1, 2, 3, 64, 1000}) check_tasks(count);
  }
  set_threads(4);
  // What the tasks wrote is there when they are done, and what was written before is there for them.
  int64_t total = 0;
  for (int64_t job = 0; job < 20000; ++job) {
    int64_t parts[5] = {};
    parallel(5, [&](int64_t i) { parts[i] = job * i; });
    for (int64_t part : parts) total += part;
  }
  expect(total == int64_t(10) * 20000 * 19999 / 2, "pool: tasks were lost");
  // Their numbers do not fit the pool's counter at once.
  const int64_t many = (int64_t(1) << 23) + 5;
  std::atomic<int64_t> sum{0}, last{0};
  parallel(many, [&](int64_t i) {
    if (i % 4096 == 0) sum.fetch_add(i, std::memory_order_relaxed);
    if (i == many - 1) last = i;
  });
  const int64_t multiples = (many - 1) / 4096;
  expect(sum == multiples * (multiples + 1) / 2 * 4096 && last == many - 1, "pool: not all of many tasks ran");
  // Several threads at once, the number of threads changing, workers asleep and awake, tasks that start tasks.
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([caller] {
      for (int round = 0; round < 100; ++round) {
        set_threads(1 + (round + caller) % 5);
        check_tasks(1 + (round * 7) % 40);
        if (round % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        std::atomic<int> inner{0};
        parallel(4, [&](int64_t) { parallel(3, [&](int64_t) { ++inner; }); });
        expect(inner == 12, "pool: %d of 12 inner tasks ran", inner.load());
      }
    });
  }
  for (auto& caller : callers) caller.join();
}

}  // namespace
