// The part of CUDA C++ that cuda_kernels.py speaks, on the CPU: the kernels compile unchanged behind this header.
//
// Every CUDA thread is a fiber with a stack of its own. A fiber gives way only at a barrier or a shuffle, and goes on
// when all threads that it waits for have come, so that a barrier in a divergent branch is a deadlock, which is
// reported, and not a silently wrong number. Between two barriers the threads run in an order that EMULATED_SEED
// shuffles: what depends on that order is a race, and differs from seed to seed. Shared memory is poisoned before
// every block. The address checks come from the compiler (-fsanitize=alignment) and from guard pages in the tests.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))  // one block runs at a time

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 { unsigned x, y, z; };

extern "C" char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

namespace emulated {

[[noreturn]] inline void fail(const char *what) {
    fprintf(stderr, "emulated GPU: %s\n", what);
    abort();
}

enum class State { READY, AT_BARRIER, IN_SHUFFLE, LEFT };

struct Fiber {
    std::vector<char> stack = std::vector<char>(1 << 16);
    ucontext_t birth;
    jmp_buf position;  // _setjmp and _longjmp: unlike swapcontext they make no system call
    bool born;
    State state;
    unsigned mask;      // of the shuffle it waits in
    unsigned shuffles;  // done so far, to alternate between the warp's two sets of slots
    dim3 index;
};

inline std::vector<Fiber> fibers;
inline std::vector<uint32_t> slots;  // [warp][2][32]: what the lanes hold out to each other
inline Fiber *running;
inline ucontext_t home;
inline jmp_buf scheduler;
inline void (*kernelBody)();
inline dim3 block, blockShape, grid;
inline uint64_t randomState;

inline unsigned randomBelow(unsigned limit) {  // xorshift
    randomState ^= randomState << 13;
    randomState ^= randomState >> 7;
    randomState ^= randomState << 17;
    return unsigned(randomState >> 11) % limit;
}

inline void giveWay(State state) {
    running->state = state;
    if (!_setjmp(running->position)) _longjmp(scheduler, 1);
}

inline void fiberMain() {
    kernelBody();
    running->state = State::LEFT;
    _longjmp(scheduler, 1);
}

inline void resume(Fiber &fiber) {
    running = &fiber;
    if (_setjmp(scheduler)) return;
    if (fiber.born) _longjmp(fiber.position, 1);
    fiber.born = true;
    getcontext(&fiber.birth);
    fiber.birth.uc_stack.ss_sp = fiber.stack.data();
    fiber.birth.uc_stack.ss_size = fiber.stack.size();
    fiber.birth.uc_link = nullptr;
    makecontext(&fiber.birth, fiberMain, 0);
    swapcontext(&home, &fiber.birth);
}

// A barrier opens when every thread of the block has come to it or has left the kernel.
inline bool openBarrier() {
    unsigned waiting = 0, left = 0;
    for (const Fiber &fiber : fibers) {
        waiting += fiber.state == State::AT_BARRIER;
        left += fiber.state == State::LEFT;
    }
    if (!waiting || waiting + left < fibers.size()) return false;
    for (Fiber &fiber : fibers)
        if (fiber.state == State::AT_BARRIER) fiber.state = State::READY;
    return true;
}

// A shuffle is done when all lanes of its mask have come with that same mask.
inline bool finishShuffle(unsigned firstLane) {
    const unsigned lanes = std::min<unsigned>(32, fibers.size() - firstLane);
    unsigned arrived = 0, mask = 0, left = 0;
    for (unsigned lane = 0; lane < lanes; ++lane) {
        const Fiber &fiber = fibers[firstLane + lane];
        if (fiber.state == State::LEFT) left |= 1u << lane;
        if (fiber.state != State::IN_SHUFFLE) continue;
        if (arrived && fiber.mask != mask) fail("the lanes of a shuffle name different masks");
        mask = fiber.mask;
        arrived |= 1u << lane;
    }
    if (arrived && (mask & left)) fail("a shuffle waits for a lane that has left the kernel");
    if (!arrived || arrived != mask) return false;
    for (unsigned lane = 0; lane < lanes; ++lane)
        if (arrived >> lane & 1) fibers[firstLane + lane].state = State::READY;
    return true;
}

inline void runBlock() {
    const unsigned threads = blockShape.x * blockShape.y * blockShape.z;
    if (__start_emulated_shared) memset(__start_emulated_shared, 0xFF, __stop_emulated_shared - __start_emulated_shared);
    fibers.resize(threads);
    slots.assign((threads + 31) / 32 * 64, 0xFFFFFFFFu);
    for (unsigned i = 0; i < threads; ++i) {
        fibers[i].born = false;
        fibers[i].state = State::READY;
        fibers[i].shuffles = 0;
        fibers[i].index = {i % blockShape.x, i / blockShape.x % blockShape.y, i / blockShape.x / blockShape.y};
    }
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    for (bool progress = true; progress;) {
        progress = false;
        for (unsigned i = threads; i > 1; --i) std::swap(order[i - 1], order[randomBelow(i)]);
        for (unsigned i : order)
            if (fibers[i].state == State::READY) {
                resume(fibers[i]);
                progress = true;
            }
        progress |= openBarrier();
        for (unsigned lane = 0; lane < threads; lane += 32) progress |= finishShuffle(lane);
    }
    for (const Fiber &fiber : fibers)
        if (fiber.state != State::LEFT) fail("deadlock: some threads never come to a barrier or shuffle");
}

inline uint32_t shuffle(unsigned mask, uint32_t value, unsigned source) {
    const unsigned thread = unsigned(running - fibers.data()), lane = thread % 32;
    if (!(mask >> lane & 1)) fail("a lane shuffles outside of its own mask");
    if (!(mask >> source & 1)) fail("a shuffle reads a lane outside of the mask");
    uint32_t *warp = &slots[thread / 32 * 64 + running->shuffles++ % 2 * 32];
    warp[lane] = value;
    running->mask = mask;
    giveWay(State::IN_SHUFFLE);
    return warp[source];
}

// One launch: the arguments as the kernel's own signature wants them, then block after block.
template <class Signature> struct Launch;
template <class... Arguments> struct Launch<void (*)(Arguments...)> {
    static inline void (*kernel)(Arguments...);
    static inline std::tuple<Arguments...> arguments;

    template <size_t... I> static void unpack(void **pointers, std::index_sequence<I...>) {
        arguments = {*static_cast<std::remove_const_t<Arguments> *>(pointers[I])...};
    }
    static void run(void (*function)(Arguments...), dim3 gridShape, dim3 shape, void **pointers) {
        kernel = function;
        unpack(pointers, std::index_sequence_for<Arguments...>{});
        kernelBody = [] { std::apply(kernel, arguments); };
        const char *seed = getenv("EMULATED_SEED");
        randomState = 2 * (seed ? strtoull(seed, nullptr, 10) : 0) + 1;
        grid = gridShape;
        blockShape = shape;
        for (block.z = 0; block.z < grid.z; ++block.z)
            for (block.y = 0; block.y < grid.y; ++block.y)
                for (block.x = 0; block.x < grid.x; ++block.x) runBlock();
    }
};

}  // namespace emulated

#define threadIdx emulated::running->index
#define blockIdx emulated::block
#define blockDim emulated::blockShape
#define gridDim emulated::grid

inline void __syncthreads() { emulated::giveWay(emulated::State::AT_BARRIER); }

template <class T> T __shfl_xor_sync(unsigned mask, T value, unsigned distance) {
    static_assert(sizeof(T) == 4, "shuffles move 32 bits");
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = emulated::shuffle(mask, bits, (unsigned(emulated::running - emulated::fibers.data()) ^ distance) % 32);
    memcpy(&value, &bits, 4);
    return value;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return result;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float value) { return int(std::nearbyint(value)); }
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

// What is PTX in the source.
inline float halfBitsToFloat(unsigned short bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return float(value);
}
inline unsigned short floatToHalfBits(float value) {
    const _Float16 rounded = _Float16(value);
    unsigned short bits;
    memcpy(&bits, &rounded, 2);
    return bits;
}
inline unsigned andOr(unsigned a, unsigned mask, unsigned b) { return (a & mask) | b; }
