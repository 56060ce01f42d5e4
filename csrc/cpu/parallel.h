// Threads for one kernel call, and how they treat denormals.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>
#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

// Denormals are read and written as zero while one of these lives: what CuPy's kernels do and cannot be told not to.
class FlushDenormals {
public:
#if defined(__x86_64__) || defined(__i386__)
    FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved_); }

private:
    unsigned saved_;
#elif defined(__aarch64__)
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t(1) << 24)));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

private:
    uint64_t saved_;
#else
#error "FlushDenormals: say how this processor flushes denormals"
#endif
};

class Barrier {
public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait() {
        if (threads_ == 1) return;
        const int round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
        } else {
            while (round_.load(std::memory_order_acquire) == round) std::this_thread::yield();
        }
    }

private:
    const int threads_;
    std::atomic<int> arrived_{0}, round_{0};
};

// The thread pool of torch's OpenMP library, found at run time by ds_horovod/kernels/cpu.py (null where there is none).
// Its threads spin for milliseconds after each of torch's own parallel loops: threads of our own would have to share
// the cores with them.
struct OpenMP {
    void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;  // GOMP_parallel
    int (*thread_num)() = nullptr;
    int (*num_threads)() = nullptr;
};
extern OpenMP openmp;

// run(t) for t = 0 .. threads-1, all at the same time, so that they may meet at a Barrier. run must not throw.
template <class Run>
void parallel(int threads, const Run& run) {
    auto guarded = [&run](int t) {
        FlushDenormals flush;
        run(t);
    };
    if (threads == 1) return guarded(0);
    if (openmp.parallel) {
        struct Region { decltype(guarded)& body; int threads; bool ran; } region{guarded, threads, true};
        openmp.parallel(
            [](void* data) {
                auto& r = *static_cast<Region*>(data);
                if (openmp.num_threads() == r.threads) r.body(openmp.thread_num());
                else if (openmp.thread_num() == 0) r.ran = false;  // a limit of the user's: fewer threads than asked for
            },
            &region, unsigned(threads), 0);
        if (region.ran) return;
    }
    std::vector<std::thread> others;
    for (int t = 1; t < threads; t++) others.emplace_back(guarded, t);
    guarded(0);
    for (auto& other : others) other.join();
}
