// SPDX-License-Identifier: Apache-2.0
// Tasks shared out among threads, and the memory that they work in.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(PFGM_STD_THREADS)
#include <atomic>
#include <exception>
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace pfgm {
namespace {

// Calls task(index, thread) for every index below count, each thread taking the next one when it
// is done with one. A task must not throw. Results must not depend on which thread ran what.
template <class Task>
void parallel_for(int num_threads, int64_t count, const Task& task) {
#if defined(PFGM_STD_THREADS)
  // For ThreadSanitizer, which cannot see how OpenMP's runtime synchronises.
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    for (int64_t i = next++; i < count; i = next++) task(i, thread);
  };
  std::vector<std::thread> threads;
  for (int thread = 1; thread < num_threads && thread < count; ++thread) {
    threads.emplace_back(work, thread);
  }
  work(0);
  for (std::thread& thread : threads) thread.join();
#else
  const int most = count < num_threads ? static_cast<int>(count) : num_threads;
#pragma omp parallel for schedule(dynamic) num_threads(most) if (most > 1)
  for (int64_t i = 0; i < count; ++i) task(i, most > 1 ? omp_get_thread_num() : 0);
#endif
}

constexpr size_t kHugePage = size_t{1} << 21;

// To be called before memory is first touched: touching small pages would take as long as the
// kernels that fill them.
inline void use_huge_pages(void* data, size_t bytes) {
  const uintptr_t start = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & -kHugePage;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
}

// An uninitialised array on a cache line's boundary. Where the tests ask for it every byte is
// 0xFF, NaN in a float, so that no kernel gets away with reading what it never wrote.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : data_(allocate(bytes(size))) {
#if defined(PFGM_POISON)
    std::memset(static_cast<void*>(data_.get()), 0xFF, bytes(size));
#endif
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  static size_t bytes(int64_t size) { return static_cast<size_t>(size) * sizeof(T) + 1; }

  static T* allocate(size_t bytes) {
    void* data = nullptr;
    const bool large = bytes >= 2 * kHugePage;
    if (posix_memalign(&data, large ? kHugePage : 64, bytes) != 0) throw std::bad_alloc();
    use_huge_pages(data, bytes);
    return static_cast<T*>(data);
  }

  std::unique_ptr<T, Free> data_;
};

}  // namespace
}  // namespace pfgm
