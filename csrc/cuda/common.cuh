// What all kernels share. Nothing is included, since NVRTC has no headers: ds_horovod/kernels/launch.py puts csrc/shared/*.h
// and this file before the file of a family. Each struct that a kernel takes by value has its twin there or in
// ds_horovod/kernels/cuda.py, field by field.
//
// Every result equals csrc/cpu's bit for bit: float32 throughout, no fused multiply-add, denormals are zero, sums in the
// order of csrc/cpu/sums.h.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

constexpr u32 kAllLanes = 0xffffffffu;
constexpr u32 kMinNormal = 0x00800000u;
constexpr int kRow = 32;           // elements of a warp's row, and the least unit of a layout
constexpr int kThreads = 256;      // of every launch
constexpr int kBlocksPerSM = 4;    // at least: 64 registers a thread
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 2048;        // elements that a block of threads takes at a time: a row for each of 8 turns of a warp
constexpr int kFew = 128;          // tensors whose addresses travel among the arguments

// Where some tensors lie in a flat array of shards (ds_horovod/layout.py).
struct Layout {
    const i64* offset;
    const i64* numel;
    const i32* tensor_at;  // for each tile the last tensor that begins no later than the tile does, or the first of all
    i64 tensors, shards, shard_numel;
};

enum Dtype { kNone, kFloat32, kFloat16, kBFloat16 };

// The tensors themselves. kNone: there are none.
struct Tensors {
    i64 dtype;
    void* const* many;  // their addresses where they are more than a few, else null
    void* few[kFew];

    __device__ void* address(i64 tensor) const { return many ? many[tensor] : few[tensor]; }
};

// What one side keeps of a bucket (ds_horovod/feedback.py), or null. A velocity comes with gradients and an error.
struct FeedbackState {
    float* error;
    float* velocity;
    const float* total;  // of a server: what is encoded instead of the error, which stays where the reply is not finite
    float momentum;
};

// ---- one element

__device__ inline u32 magnitude(float x) { return bits_of(x) & ~kSignBit; }
__device__ inline bool is_finite(float x) { return magnitude(x) <= kMaxFinite; }
// Zero for a denormal. Arithmetic does that by itself, but for what a compiler leaves out: a division by one.
__device__ inline float flush(float x) { return magnitude(x) < kMinNormal ? 0.f : x; }
__device__ inline float with_sign_of(float positive, float x) { return float_of(bits_of(positive) | (bits_of(x) & kSignBit)); }
// The magnitude or, where that is less, the limit, with the sign; not of NaN.
__device__ inline float limited(float x, float limit) {
    return with_sign_of(float_of(min(magnitude(x), bits_of(limit))), x);
}

// ---- four neighbours, in one access where their address allows it

template <class T> struct alignas(4 * sizeof(T)) Four { T x[4]; };

template <class T> __device__ inline bool is_aligned(const T* p) { return u64(p) % (4 * sizeof(T)) == 0; }
template <class T> __device__ inline void load(const T* p, int count, float x[4]) {
    if (count == 4 && is_aligned(p)) {
        const Four<T> four = *reinterpret_cast<const Four<T>*>(p);
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = to_float(four.x[j]);
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = j < count ? to_float(p[j]) : 0.f;
    }
}
template <class T> __device__ inline void store(T* p, int count, const float x[4]) {
    if (count == 4 && is_aligned(p)) {
        Four<T> four;
#pragma unroll
        for (int j = 0; j < 4; j++) from_float(x[j], &four.x[j]);
        *reinterpret_cast<Four<T>*>(p) = four;
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (j < count) from_float(x[j], p + j);
    }
}

// ---- where things are

__device__ inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
__device__ inline int lane_of_thread() { return int(threadIdx.x) % 32; }
__device__ inline int warp_of_thread() { return int(threadIdx.x) / 32; }

// A position of the flat array: of which tensor it is which element, and how many of the tensor's follow, itself included;
// none where it is padding.
struct Place { i64 tensor, first, count; };

__device__ inline Place place_at(const Layout& layout, i64 position) {
    i64 tensor = layout.tensor_at[position / kTile];
    while (tensor + 1 < layout.tensors && layout.offset[tensor + 1] <= position) tensor++;
    const i64 first = position - layout.offset[tensor];
    return {tensor, first, first < 0 ? 0 : max(layout.numel[tensor] - first, 0ll)};
}

// Four neighbours of the shard blockIdx.y, or a row of 32, for each thread; a count of zero: none, or padding.
template <int kNumel> struct Some {
    i64 inside, position;  // of the first, in the shard and in the flat array
    Place place;
    int count;

    __device__ explicit Some(const Layout& layout) : place{0, 0, 0}, count(0) {
        inside = kNumel * (i64(blockIdx.x) * kThreads + threadIdx.x);
        position = i64(blockIdx.y) * layout.shard_numel + inside;
        if (inside >= layout.shard_numel) return;
        place = place_at(layout, position);
        count = int(min(place.count, i64(kNumel)));
    }
};
using Quad = Some<4>;
using Row = Some<kRow>;

template <class T> struct Pointed;
template <class T> struct Pointed<T*> { using type = T; };

// call(type), where type is a null pointer of the tensors' element type: it only names that
template <class Call> __device__ inline void with_element_type(i64 dtype, const Call& call) {
    switch (dtype) {
        case kFloat16: return call(static_cast<Half*>(nullptr));
        case kBFloat16: return call(static_cast<BFloat16*>(nullptr));
        default: return call(static_cast<float*>(nullptr));
    }
}

// The terms of v from some element on: gradient, error and velocity, or a server's total or error alone.
template <class G> struct Terms {
    const G* g;
    const float *e, *u;
    float momentum;

    // v, and what becomes of the velocity
    __device__ float value(i64 i, float& velocity) const {
        float v = g ? to_float(g[i]) : e[i];
        if (u) v = velocity = momentum * u[i] + v;
        return g && e ? v + e[i] : v;
    }
    __device__ void values(i64 i, int count, float v[4], float velocity[4]) const {
        float x[4];
        if (g) load(g + i, count, v);
        else load(e + i, count, v);
        if (u) {
            load(u + i, count, x);
#pragma unroll
            for (int j = 0; j < 4; j++) v[j] = velocity[j] = momentum * x[j] + v[j];
        }
        if (g && e) {
            load(e + i, count, x);
#pragma unroll
            for (int j = 0; j < 4; j++) v[j] = v[j] + x[j];
        }
    }
};

// `type` says of which element type the tensors are.
template <class G> __device__ inline G* element(G* type, const Tensors& tensors, const Place& place) {
    return static_cast<G*>(tensors.address(place.tensor)) + place.first;
}
template <class G>
__device__ inline Terms<G> terms_at(G* type, const Tensors& gradients, const FeedbackState& state, const Place& place,
                                    i64 position) {
    const float* e = state.total ? state.total : state.error;
    return {gradients.dtype == kNone ? nullptr : element(type, gradients, place), e ? e + position : nullptr,
            state.velocity ? state.velocity + position : nullptr, state.momentum};
}

// ---- sums in the fixed order of csrc/cpu/sums.h

// A team of warps shares a block of a format in the shard blockIdx.y; the teams of a block of threads, 8 / warps of them, walk
// in step.
struct Team {
    int warps, first_warp;  // 1, 2, 4 or 8
    i64 inside, position;   // of the block, in its shard and in the flat array
    Place place;
    i64 count;              // its elements; none: padding, or no block

    __device__ Team(const Layout& layout, i64 block, i64 warps_) : place{0, 0, 0}, count(0) {
        warps = int(warps_);
        first_warp = warp_of_thread() / warps * warps;
        inside = (i64(blockIdx.x) * (kWarps / warps) + first_warp / warps) * block;
        position = i64(blockIdx.y) * layout.shard_numel + inside;
        if (inside >= layout.shard_numel) return;
        place = place_at(layout, position);
        count = min(place.count, block);
    }
    __device__ int warp() const { return warp_of_thread() - first_warp; }
    __device__ int thread() const { return int(threadIdx.x) - 32 * first_warp; }
    __device__ bool leads() const { return thread() == 0; }
};

// Each lane of a warp takes its column of 8 rows, one group; the groups of a team of warps follow each other, tile after
// tile. Every warp of the team ends with the same sum.
struct OrderedSum {
    float (*groups)[32];  // shared, for each warp of the block
    const Team& team;
    float total;

    // `group`: of this lane's column. All threads of the block must call it, and meet again before the next call.
    __device__ void add(float group) {
        groups[warp_of_thread()][lane_of_thread()] = group;
        __syncthreads();
        for (int w = 0; w < team.warps; w++) total = total + groups[team.first_warp + w][lane_of_thread()];
    }
    __device__ float finish() const {
        float sum = total;
        const int apart[5] = {8, 16, 1, 2, 4};
        for (int d : apart) sum = sum + __shfl_xor_sync(kAllLanes, sum, d);
        return sum;
    }
};

// ---- rollback
//
// Where the reply is not finite, what a worker has sent is lost through no fault of its own. A mask has a bit for each element
// of the flat array, a word for each row.

// A row's e = e' + Q[v] - g where its bits say so. Where a velocity was sent, and has become zero, the error keeps its part:
// e + m u. sent(j) is the row's value j. Elements that were not finite have not been encoded.
template <class G, class Sent>
__device__ inline void roll_back(G* type, const Row& row, u32 mask, const Tensors& gradients, const FeedbackState& state,
                                 bool sparse, const Sent& sent) {
    const G* g = element(type, gradients, row.place);
    for (int j = 0; j < row.count; j++) {
        if (!(mask >> j & 1)) continue;
        const float own = sent(j), gradient = to_float(g[j]);
        float& e = state.error[row.position + j];
        if (!is_finite(own) || !is_finite(gradient)) continue;
        if (state.velocity && !(sparse && own != 0.f)) {
            float& u = state.velocity[row.position + j];
            e = limited(e + own - u, float_of(kMaxFinite));  // rounding may take it past the largest
            u = limited((u - gradient) / state.momentum, float_of(kMaxFinite));
        } else {
            e = limited(e + own - gradient, float_of(kMaxFinite));
        }
    }
}
