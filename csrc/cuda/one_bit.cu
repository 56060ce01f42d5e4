// One bit an element: a scale for each block, parameter or bucket, and the signs. What a chunk is stands in
// ds_horovod/kernels/formats.py.
//
// A team of warps works on a block, 8 rows a warp, a lane to a column, so that a row's signs are one ballot and the rows' sums
// come in the order of csrc/cpu/sums.h. Of a block of at most 2048 elements, values stay in registers between its two sweeps:
// bytes an element, with an error: encode 12.1, decode 4.1, server of n workers 8.1 + n / 8.

enum Granularity { kOfBlock, kOfParameter, kOfBucket };

struct OneBit {
    i64 block, l2, granularity;
    i64 team;  // warps that share a block: 1, 2, 4 or 8
    i64 bits_at, chunk_bytes;
};

// Scales of more than a block: which blocks, in the order of the tensors, have one, and where it is.
struct Region { i64 first, blocks, elements, shard, slot; };
struct Regions {
    const i64* first_block;   // of each tensor, among all blocks
    const i64* first_tensor;  // with elements in each shard
    const Region* region;
};

constexpr int kRows = 8;  // of a warp at a time

// A thread's part of a block: a column of 8 rows in each tile.
struct Column : Team {
    __device__ Column(const OneBit& format, const Layout& layout) : Team(layout, format.block, format.team) {}

    // Of the tile that begins at `tile`: this thread's element in the warp's first row, and how many of the block's follow.
    __device__ i64 first(i64 tile) const { return tile + kRow * kRows * warp() + lane_of_thread(); }
    __device__ int left(i64 tile) const { return int(min(count - first(tile), i64(kRow * kRows))); }
};

__device__ inline i64 slot_of(const OneBit& format, const Regions& regions, i64 tensor, i64 shard, i64 inside) {
    if (format.granularity == kOfBlock) return u32(inside) / u32(format.block);
    return format.granularity == kOfParameter ? tensor - regions.first_tensor[shard] : 0;
}
__device__ inline float* scale_in(u8* chunks, i64 chunk_bytes, i64 chunk, i64 slot) {
    return reinterpret_cast<float*>(chunks + chunk * chunk_bytes) + slot;
}
__device__ inline float scale_in(const u8* chunks, i64 chunk_bytes, i64 chunk, i64 slot) {
    return reinterpret_cast<const float*>(chunks + chunk * chunk_bytes)[slot];
}
__device__ inline float with_bit(float x, u32 negative) { return float_of(bits_of(x) ^ negative << 31); }

// ---- values of a column: 8 rows of a tile; zero beyond the block's elements

template <class G> struct OwnValues {
    Terms<G> terms;

    __device__ void column(const Column& at, i64 tile, float v[kRows]) const {
        const i64 first = at.first(tile);
        const int left = at.left(tile);
        float none;
#pragma unroll
        for (int k = 0; k < kRows; k++) v[k] = kRow * k < left ? terms.value(first + kRow * k, none) : 0.f;
    }
};

// error + weight * what each worker has sent, one after the other
struct SumOfWorkers {
    const OneBit& format;
    const float* error;  // of the block, or null
    const u8* pushed;
    i64 workers, slot;
    float weight;

    __device__ void column(const Column& at, i64 tile, float v[kRows]) const {
        const i64 first = at.first(tile);
        const int left = at.left(tile), warp_left = left + lane_of_thread();
#pragma unroll
        for (int k = 0; k < kRows; k++) v[k] = error && kRow * k < left ? error[first + kRow * k] : 0.f;
        if (warp_left <= 0) return;
        const i64 words = format.bits_at + (at.inside + tile) / 8 + 4 * kRows * at.warp();
        const bool whole = format.block % (kRow * kRows) == 0;
        for (i64 w = 0; w < workers; w++) {
            const float s = scale_in(pushed, format.chunk_bytes, w, slot) * weight;
            const u32* from = reinterpret_cast<const u32*>(pushed + w * format.chunk_bytes + words);
            u32 word[kRows];
            if (whole) {
                const Four<u32>* fours = reinterpret_cast<const Four<u32>*>(from);
                const Four<u32> low = fours[0], high = fours[1];
#pragma unroll
                for (int k = 0; k < 4; k++) word[k] = low.x[k], word[k + 4] = high.x[k];
            } else {
#pragma unroll
                for (int k = 0; k < kRows; k++) word[k] = kRow * k < warp_left ? from[k] : 0;
            }
#pragma unroll
            for (int k = 0; k < kRows; k++) v[k] = v[k] + with_bit(s, word[k] >> lane_of_thread() & 1);
        }
#pragma unroll
        for (int k = 0; k < kRows; k++)
            if (kRow * k >= left) v[k] = 0.f;
    }
};

// ---- the two sweeps over a block

// The sum of |v|, or of v * v. `v` ends as the last tile's. All threads of the block must call it.
template <class Values>
__device__ inline float sum_of_block(const OneBit& format, const Column& at, const Values& values, float (*groups)[32],
                                     float* total, float v[kRows]) {
    OrderedSum sum{groups, at, 0.f};
    for (i64 tile = 0; tile < format.block; tile += kTile) {
        if (tile) __syncthreads();  // all have read the last tile's
        values.column(at, tile, v);
        float group = 0.f;
#pragma unroll
        for (int k = 0; k < kRows; k++) group = group + (format.l2 ? v[k] * v[k] : float_of(magnitude(v[k])));
        sum.add(group);
        if (total) {
#pragma unroll
            for (int k = 0; k < kRows; k++)
                if (kRow * k < at.left(tile)) total[at.first(tile) + kRow * k] = v[k];
        }
    }
    return sum.finish();
}

// Signs, and error = v - scale * sign(v), unless the scale is not finite. `v` holds the values of a block of one tile.
template <class Values>
__device__ inline void settle(const OneBit& format, const Column& at, const Values& values, float scale, u8* chunk,
                              float* error, float v[kRows]) {
    const bool finite = scale <= float_of(kMaxFinite);
    u32* words = reinterpret_cast<u32*>(chunk + format.bits_at + at.inside / 8);
    for (i64 tile = 0; tile < at.count; tile += kTile) {
        if (format.block > kTile) values.column(at, tile, v);
        const i64 first = at.first(tile);
        const int left = at.left(tile);
        u32 word = 0;
#pragma unroll
        for (int k = 0; k < kRows; k++) {
            const u32 signs = __ballot_sync(kAllLanes, finite && bits_of(v[k]) >> 31);
            if (lane_of_thread() == k) word = signs;
            if (error && finite && kRow * k < left) error[first + kRow * k] = v[k] - with_sign_of(scale, v[k]);
        }
        const i64 row = tile / kRow + kRows * at.warp() + lane_of_thread();
        if (lane_of_thread() < kRows && kRow * row < at.count) words[row] = word;
    }
}

template <class Values>
__device__ inline void encode_block(const OneBit& format, const Column& at, const Values& values, float (*groups)[32],
                                    u8* chunk, float* error) {
    float v[kRows];
    const float mean = sum_of_block(format, at, values, groups, nullptr, v) / float(at.count);
    const float scale = format.l2 ? sqrtf(mean) : mean;
    if (!at.count) return;
    settle(format, at, values, scale, chunk, error, v);
    if (at.leads())
        *scale_in(chunk, 0, 0, u32(at.inside) / u32(format.block)) = scale <= float_of(kMaxFinite) ? scale : float_of(kNaN);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
one_bit_encode(OneBit format, Layout layout, Regions, Tensors gradients, FeedbackState state, u8* chunks) {
    __shared__ float groups[kWarps][32];
    const Column at(format, layout);
    with_element_type(gradients.dtype, [&](auto* type) {
        const OwnValues<typename Pointed<decltype(type)>::type> own{terms_at(type, gradients, state, at.place, at.position)};
        encode_block(format, at, own, groups, chunks + blockIdx.y * format.chunk_bytes,
                     state.error ? state.error + at.position : nullptr);
    });
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
one_bit_serve(OneBit format, Layout layout, Regions, const u8* pushed, i64 workers, float weight, float* error, u8* chunk) {
    __shared__ float groups[kWarps][32];
    const Column at(format, layout);
    float* e = error ? error + at.position : nullptr;
    const SumOfWorkers of_all{format, e, pushed, workers, u32(at.inside) / u32(format.block), weight};
    encode_block(format, at, of_all, groups, chunk, e);
}

// ---- scales of parameters or buckets: sums of blocks, then the scales, then signs and errors

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
one_bit_sums(OneBit format, Layout layout, Regions regions, Tensors gradients, FeedbackState state, float* sums) {
    __shared__ float groups[kWarps][32];
    const Column at(format, layout);
    with_element_type(gradients.dtype, [&](auto* type) {
        float v[kRows];
        const OwnValues<typename Pointed<decltype(type)>::type> own{terms_at(type, gradients, state, at.place, at.position)};
        const float sum = sum_of_block(format, at, own, groups, nullptr, v);
        if (at.count && at.leads())
            sums[regions.first_block[at.place.tensor] + at.place.first / format.block] = sum;
    });
}

// The same of a server: total = error + weight * what each worker has sent.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
one_bit_serve_sums(OneBit format, Layout layout, Regions regions, const u8* pushed, i64 workers, float weight,
                   const float* error, float* total, float* sums) {
    __shared__ float groups[kWarps][32];
    const Column at(format, layout);
    float v[kRows];
    const i64 slot = slot_of(format, regions, at.place.tensor, 0, at.inside);
    const SumOfWorkers of_all{format, error ? error + at.position : nullptr, pushed, workers, slot, weight};
    const float sum = sum_of_block(format, at, of_all, groups, total + at.position, v);
    if (at.count && at.leads())
        sums[regions.first_block[at.place.tensor] + at.place.first / format.block] = sum;
}

// A block of threads for each region: 256 lanes, then pairwise.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
one_bit_scales(OneBit format, Layout, Regions regions, const float* sums, u8* chunks) {
    __shared__ double lanes[kThreads];
    const Region region = regions.region[blockIdx.x];
    double sum = 0.0;
    for (i64 b = threadIdx.x; b < region.blocks; b += kThreads) sum = sum + double(sums[region.first + b]);
    lanes[threadIdx.x] = sum;
    for (int half = kThreads / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) lanes[threadIdx.x] = lanes[threadIdx.x] + lanes[threadIdx.x + half];
    }
    if (threadIdx.x) return;
    const double mean = lanes[0] / double(region.elements);
    const float scale = flush(float(format.l2 ? sqrt(mean) : mean));
    *scale_in(chunks, format.chunk_bytes, region.shard, region.slot) = scale <= float_of(kMaxFinite) ? scale : float_of(kNaN);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
one_bit_signs(OneBit format, Layout layout, Regions regions, Tensors gradients, FeedbackState state, u8* chunks) {
    const Column at(format, layout);
    if (!at.count) return;
    with_element_type(gradients.dtype, [&](auto* type) {
        float v[kRows];
        const OwnValues<typename Pointed<decltype(type)>::type> own{terms_at(type, gradients, state, at.place, at.position)};
        own.column(at, 0, v);
        const i64 slot = slot_of(format, regions, at.place.tensor, blockIdx.y, at.inside);
        const float scale = *scale_in(chunks, format.chunk_bytes, blockIdx.y, slot);
        settle(format, at, own, scale, chunks + blockIdx.y * format.chunk_bytes,
               state.error ? state.error + at.position : nullptr, v);
    });
}

// ---- what arrives

// The signs of neighbours that share a word, the first in the lowest bit.
__device__ inline u32 signs_at(const OneBit& format, const u8* chunks, i64 chunk, i64 inside) {
    return reinterpret_cast<const u32*>(chunks + chunk * format.chunk_bytes + format.bits_at)[inside / kRow] >> inside % kRow;
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
one_bit_decode(OneBit format, Layout layout, Regions regions, const u8* chunks, Tensors gradients) {
    const Quad at(layout);
    if (!at.count) return;
    const i64 slot = slot_of(format, regions, at.place.tensor, blockIdx.y, at.inside);
    const float scale = scale_in(chunks, format.chunk_bytes, blockIdx.y, slot);
    const u32 signs = signs_at(format, chunks, blockIdx.y, at.inside);
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = with_bit(scale, signs >> j & 1);
    with_element_type(gradients.dtype, [&](auto* type) { store(element(type, gradients, at.place), at.count, v); });
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
one_bit_accumulate(OneBit format, Layout layout, Regions regions, const u8* pushed, i64 workers, float weight, float* total) {
    const Quad at(layout);
    if (!at.count) return;
    const i64 slot = slot_of(format, regions, at.place.tensor, 0, at.inside);
    float v[4];
    load(total + at.position, at.count, v);
    for (i64 w = 0; w < workers; w++) {
        const float scale = scale_in(pushed, format.chunk_bytes, w, slot) * weight;
        const u32 signs = signs_at(format, pushed, w, at.inside);
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = v[j] + with_bit(scale, signs >> j & 1);
    }
    store(total + at.position, at.count, v);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
one_bit_nonfinite_mask(OneBit format, Layout layout, Regions regions, const u8* chunks, u32* mask) {
    const Row row(layout);
    if (row.inside >= layout.shard_numel) return;
    const i64 slot = slot_of(format, regions, row.place.tensor, blockIdx.y, row.inside);
    const bool finite = !row.count || is_finite(scale_in(chunks, format.chunk_bytes, blockIdx.y, slot));
    mask[row.position / kRow] = finite ? 0 : kAllLanes;
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
one_bit_rollback(OneBit format, Layout layout, Regions regions, const u8* chunks, const u32* mask, Tensors gradients,
                  FeedbackState state, i64 sparse) {
    const Row row(layout);
    if (!row.count || !mask[row.position / kRow]) return;
    const i64 slot = slot_of(format, regions, row.place.tensor, blockIdx.y, row.inside);
    const float scale = scale_in(chunks, format.chunk_bytes, blockIdx.y, slot);
    const u32 signs = signs_at(format, chunks, blockIdx.y, row.inside);
    with_element_type(gradients.dtype, [&](auto* type) {
        roll_back(type, row, mask[row.position / kRow], gradients, state, sparse,
                  [&](int j) { return with_bit(scale, signs >> j & 1); });
    });
}
