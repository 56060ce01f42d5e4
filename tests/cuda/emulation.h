// Enough of CUDA to run a kernel's source on a CPU, one block of threads after the other.
//
// Each CUDA thread is a fiber. It runs until it must wait (__syncthreads, or a warp's ballot or shuffle), and a schedule says
// who goes on then. Included before the sources by tests/cuda/emulator.py, which appends EMULATE(name) for each kernel.
//
// Checked, each with a message instead of a result:
//   * a barrier, or a warp's operation, that not all of its threads reach, whether they wait elsewhere or have ended;
//   * barriers of different lines that meet; lanes outside of their mask; masks, or operations, that differ within a warp;
//   * launch limits: threads, blocks, bytes of arguments.
// Shared memory holds garbage at the beginning of each block. Denormals are zero, as under -ftz=true. Reads and writes out of
// bounds are left to AddressSanitizer, which knows fibers and shared arrays.
//
// Not shown: whether blocks run in another order on a device than any tried here, whether what one block writes is seen by
// another in time, memory banks, registers, speed. Reductions of warps, cooperative groups, textures and dynamic shared
// memory are not there. x86-64 only.
#pragma once

#include <xmmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
// All shared arrays in one section, which is filled with garbage before each block.
#define __shared__ static __attribute__((section("emulated_shared")))
extern char __start_emulated_shared[] __attribute__((weak)), __stop_emulated_shared[] __attribute__((weak));

struct dim3 { unsigned x = 1, y = 1, z = 1; };

namespace emulation {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kMostArgumentBytes = 4096;

enum class Wait { nothing, barrier, warp, ended };
enum class Operation { sync, ballot, shuffle };

struct Thread {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    Wait wait = Wait::nothing;
    int line = 0;                // of the barrier it waits at
    Operation operation{};       // that it waits in, with its mask, value and the lane whose value it wants
    uint32_t mask = 0, source = 0;
    uint64_t value = 0, result = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's
};

// What runs now. One block at a time, one thread at a time.
struct State {
    dim3 grid, block, block_index, thread_index;
    std::vector<Thread> threads;
    unsigned count = 0, current = 0, ended = 0, at_barrier = 0;
    std::vector<unsigned> order, rank;  // of the schedule: the i-th thread to be asked, and when a thread is asked
    std::vector<uint64_t> ready;        // a bit for each rank
    void* scheduler = nullptr;          // its stack pointer
    void (*body)(void*) = nullptr;
    void* arguments = nullptr;
    std::string error;
#if defined(__SANITIZE_ADDRESS__)
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    void* scheduler_fake_stack = nullptr;
#endif
};
inline State state;

// ---- fibers

extern "C" void emulation_switch(void** save, void* to);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");

inline void to_scheduler(bool for_ever = false) {
    Thread& self = state.threads[state.current];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &self.fake_stack, state.scheduler_stack, state.scheduler_stack_size);
#endif
    emulation_switch(&self.stack_pointer, state.scheduler);
    (void)for_ever;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

inline void to_thread(unsigned t) {
    Thread& next = state.threads[t];
    const dim3 b = state.block;
    state.current = t;
    state.thread_index = {t % b.x, t / b.x % b.y, t / (b.x * b.y)};
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&state.scheduler_fake_stack, next.stack, kStack);
#endif
    emulation_switch(&state.scheduler, next.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(state.scheduler_fake_stack, nullptr, nullptr);
#endif
}

[[noreturn]] inline void fail(const std::string& what) {
    const dim3 b = state.block_index;
    state.error = what + " (block " + std::to_string(b.x) + ", thread " + std::to_string(state.current) + ")";
    to_scheduler(true);
    abort();
}

inline void set_ready(unsigned t, bool is) {
    const unsigned r = state.rank[t];
    if (is) state.ready[r / 64] |= uint64_t(1) << r % 64;
    else state.ready[r / 64] &= ~(uint64_t(1) << r % 64);
}

inline void wait_for(Wait what) {
    state.threads[state.current].wait = what;
    set_ready(state.current, false);
    to_scheduler();
}

inline void wake(unsigned t) {
    state.threads[t].wait = Wait::nothing;
    set_ready(t, true);
}

[[noreturn]] inline void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &state.scheduler_stack, &state.scheduler_stack_size);
#endif
    state.body(state.arguments);
    state.threads[state.current].wait = Wait::ended;
    set_ready(state.current, false);
    state.ended++;
    to_scheduler(true);
    abort();
}

// ---- where threads meet

inline void barrier(int line) {
    Thread& self = state.threads[state.current];
    self.line = line;
    if (++state.at_barrier < state.count) return wait_for(Wait::barrier);
    state.at_barrier = 0;
    for (unsigned t = 0; t < state.count; t++) {
        if (state.threads[t].line != line)
            fail("barriers of lines " + std::to_string(state.threads[t].line) + " and " + std::to_string(line) + " meet");
        if (state.threads[t].wait == Wait::barrier) wake(t);
    }
}

inline uint64_t in_warp(Operation operation, uint32_t mask, uint64_t value, uint32_t source) {
    const unsigned first = state.current & ~31u, lane = state.current & 31u;
    Thread* const warp = &state.threads[first];
    Thread& self = warp[lane];
    if (!(mask >> lane & 1)) fail("a lane outside of its own mask");
    self.operation = operation;
    self.mask = mask;
    self.value = value;
    self.source = source;
    bool all = true;
    for (unsigned i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        if (first + i >= state.count || warp[i].wait == Wait::ended) fail("a mask with a lane that is not there any more");
        if (i == lane) continue;
        if (warp[i].wait != Wait::warp) all = false;
        else if (warp[i].mask != mask) fail("different masks in a warp");
        else if (warp[i].operation != operation) fail("different operations meet in a warp");
    }
    if (!all) {
        wait_for(Wait::warp);
        return self.result;
    }
    uint64_t ballot = 0;
    for (unsigned i = 0; i < 32; i++)
        if (mask >> i & 1 && warp[i].value) ballot |= uint64_t(1) << i;
    for (unsigned i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        if (operation == Operation::shuffle && !(mask >> warp[i].source & 1)) fail("a shuffle from a lane outside of the mask");
        warp[i].result = operation == Operation::shuffle ? warp[warp[i].source].value : ballot;
    }
    for (unsigned i = 0; i < 32; i++)
        if (i != lane && mask >> i & 1) wake(first + i);
    return self.result;
}

template <class T> uint64_t pack(T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class T> T unpack(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T> T shuffle(uint32_t mask, T value, uint32_t source) {
    return unpack<T>(in_warp(Operation::shuffle, mask, pack(value), source));
}

// ---- schedules

// The next rank that is ready; -1: none. In turns, it is looked for after `last`, else from the first on.
inline int next_ready(int last, bool in_turns) {
    const unsigned words = unsigned(state.ready.size());
    const unsigned from = in_turns ? unsigned(last + 1) % (64 * words) : 0;
    for (unsigned i = 0; i <= words; i++) {
        const unsigned w = (from / 64 + i) % words;
        uint64_t bits = state.ready[w];
        if (i == 0) bits &= ~uint64_t(0) << from % 64;
        if (bits) return int(64 * w + unsigned(__builtin_ctzll(bits)));
    }
    return -1;
}

// Shared arrays hold what is there by chance. Not instrumented: it writes over what guards them, too.
__attribute__((no_sanitize("address", "undefined"), optimize("no-tree-loop-distribute-patterns"))) inline void spoil_shared() {
    for (volatile char* p = __start_emulated_shared; p < __stop_emulated_shared; p++) *p = char(0xa5);
}

inline void run_block(bool in_turns) {
    spoil_shared();
    state.ended = state.at_barrier = 0;
    for (unsigned t = 0; t < state.count; t++) {
        Thread& thread = state.threads[t];
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(thread.stack, kStack);
#endif
        void** top = reinterpret_cast<void**>(thread.stack + kStack - 64);
        *--top = nullptr;  // so that the stack is aligned as after a call
        *--top = reinterpret_cast<void*>(&thread_main);
        for (int i = 0; i < 6; i++) *--top = nullptr;  // what emulation_switch takes off
        thread.stack_pointer = top;
        thread.fake_stack = nullptr;
        wake(t);
    }
    for (int last = -1; state.ended < state.count;) {
        last = next_ready(last, in_turns);
        if (last < 0) {
            unsigned waiting[4] = {};
            for (unsigned t = 0; t < state.count; t++) waiting[int(state.threads[t].wait)]++;
            auto count = [&](Wait what) { return std::to_string(waiting[int(what)]); };
            state.error = "deadlock: " + count(Wait::barrier) + " threads wait at a barrier, " + count(Wait::warp) +
                          " in a warp, " + count(Wait::ended) + " have ended" +
                          " (block " + std::to_string(state.block_index.x) + ")";
        } else {
            to_thread(state.order[unsigned(last)]);
        }
        if (!state.error.empty()) return;
    }
}

// Schedule s, a few bits: 1: threads, and blocks, from the last to the first; 2: greedy, the first that can go on does, so
// that one warp runs as far ahead of the others as it can, and one lane of the others; 4: warps in random order.
inline void arrange(unsigned schedule) {
    const unsigned warps = (state.count + 31) / 32;
    std::vector<unsigned> order(warps);
    std::iota(order.begin(), order.end(), 0u);
    if (schedule & 4) std::shuffle(order.begin(), order.end(), std::mt19937(schedule));
    state.order.clear();
    for (unsigned w : order)
        for (unsigned t = 32 * w; t < std::min(32 * w + 32, state.count); t++) state.order.push_back(t);
    if (schedule & 1) std::reverse(state.order.begin(), state.order.end());
    state.rank.resize(state.count);
    for (unsigned r = 0; r < state.count; r++) state.rank[state.order[r]] = r;
    state.ready.assign((state.count + 63) / 64, 0);
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

// Null, or what went wrong.
template <class... A>
const char* launch(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, unsigned given, unsigned schedule) {
    static std::string message;
    struct Call { void (*kernel)(A...); void** arguments; } what{kernel, arguments};
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (given != sizeof...(A)) return "another number of arguments than the kernel has parameters";
    if (threads == 0 || threads > kMostThreads || block.z > 64) return "threads of a block out of range";
    if (!grid.x || !grid.y || !grid.z) return "a grid without blocks";
    if (grid.x > 0x7fffffffu || grid.y > 0xffff || grid.z > 0xffff) return "too many blocks";
    if ((size_t(0) + ... + sizeof(A)) > kMostArgumentBytes) return "more than 4096 bytes of arguments";
    while (state.threads.size() < threads) {
        void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) return "no memory for another fiber";
        state.threads.emplace_back().stack = static_cast<char*>(stack);
    }
    state.grid = grid;
    state.block = block;
    state.count = unsigned(threads);
    state.error.clear();
    state.body = [](void* data) {
        auto* c = static_cast<Call*>(data);
        call(c->kernel, c->arguments, std::index_sequence_for<A...>{});
    };
    state.arguments = &what;
    arrange(schedule);
    const unsigned saved = _mm_getcsr();
    _mm_setcsr(saved | 0x8040);  // denormals are zero, before and after each operation
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks && state.error.empty(); i++) {
        const uint64_t b = schedule & 1 ? blocks - 1 - i : i;
        state.block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
        run_block(!(schedule & 2));
    }
    _mm_setcsr(saved);
    message = state.error;
    return message.empty() ? nullptr : message.c_str();
}

}  // namespace emulation

#define EMULATE(kernel)                                                                                             \
    extern "C" __attribute__((visibility("default"))) const char* emulated_##kernel(                               \
        const unsigned* grid, const unsigned* block, void** arguments, unsigned count, unsigned schedule) {         \
        const dim3 blocks{grid[0], grid[1], grid[2]}, threads{block[0], block[1], block[2]};                       \
        return emulation::launch(kernel, blocks, threads, arguments, count, schedule);                             \
    }

// ---- what a kernel may call

#define threadIdx (emulation::state.thread_index)
#define blockIdx (emulation::state.block_index)
#define blockDim (emulation::state.block)
#define gridDim (emulation::state.grid)

#define __syncthreads() emulation::barrier(__LINE__)
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::in_warp(emulation::Operation::sync, mask, 0, 0); }
inline unsigned __ballot_sync(unsigned mask, int is) {
    return unsigned(emulation::in_warp(emulation::Operation::ballot, mask, is != 0, 0));
}
inline int __any_sync(unsigned mask, int is) { return __ballot_sync(mask, is) != 0; }
inline int __all_sync(unsigned mask, int is) { return __ballot_sync(mask, is) == mask; }
template <class T> T __shfl_sync(unsigned mask, T value, int lane) {
    return emulation::shuffle(mask, value, unsigned(lane) & 31u);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return emulation::shuffle(mask, value, (threadIdx.x & 31u) ^ unsigned(bits));
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by) {
    const unsigned lane = threadIdx.x & 31u;
    return emulation::shuffle(mask, value, lane >= by ? lane - by : lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    const unsigned lane = threadIdx.x & 31u;
    return emulation::shuffle(mask, value, lane + by < 32 ? lane + by : lane);
}

// No fiber is interrupted, so these are atomic as they stand.
template <class T, class U> T atomicAdd(T* p, U x) { const T old = *p; *p = T(old + T(x)); return old; }
template <class T, class U> T atomicMax(T* p, U x) { const T old = *p; *p = std::max(old, T(x)); return old; }
template <class T, class U> T atomicMin(T* p, U x) { const T old = *p; *p = std::min(old, T(x)); return old; }
template <class T, class U> T atomicOr(T* p, U x) { const T old = *p; *p = old | T(x); return old; }
template <class T, class U> T atomicAnd(T* p, U x) { const T old = *p; *p = old & T(x); return old; }
template <class T, class U> T atomicExch(T* p, U x) { const T old = *p; *p = T(x); return old; }
template <class T, class U, class V> T atomicCAS(T* p, U expected, V x) {
    const T old = *p;
    if (old == T(expected)) *p = T(x);
    return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T x) { *p = x; }

inline unsigned __float_as_uint(float x) { return emulation::unpack<unsigned>(emulation::pack(x)); }
inline float __uint_as_float(unsigned x) { return emulation::unpack<float>(emulation::pack(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (x >> i & 1u) << (31 - i);
    return reversed;
}
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
