// Threads of our own: a kernel takes microseconds, and XLA's pool takes tens of them to wake.
#pragma once

#include <cstdint>

namespace irkit {

// How many threads, the caller's included, the next calls use.
void set_threads(int threads);
int threads();

// task(context, i) for every i below `count`, on several threads; returns when all are done. Tasks are taken one by
// one, so that a thread whose core is busy with something else takes few of them. Called by several threads at
// once, all but one compute on their own.
void run(int64_t count, void (*task)(void* context, int64_t i), void* context);

template <class F>
void parallel(int64_t count, const F& task) {
  run(count, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); }, const_cast<F*>(&task));
}

}  // namespace irkit
