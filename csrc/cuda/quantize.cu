// A few levels an element, evenly spaced up to a scale of its block; the law stands in csrc/cpu/quantize.inl, what a chunk is
// in ds_horovod/kernels/formats.py.
//
// A byte, or the three bytes of 3 bits, holds elements that lie far apart: a column. Threads take neighbouring columns, so
// that gradients, errors and codes are read and written side by side, and nothing is exchanged but a block's scale. Of a block
// of at most 2048 elements, values stay in registers between its two sweeps: bytes an element, with an error: encode
// 12 + bits / 8, decode 4 + bits / 8, server of n workers 8 + (n + 1) bits / 8, all plus 4 / block for each payload.

// Compiled for one code each: BITS of an element (0: base 3), and whether rounding is STOCHASTIC and scales are norms (L2).
constexpr int kTogether = BITS == 0 ? 5 : BITS == 3 ? 8 : 8 / BITS;   // elements of a column
constexpr int kColumns = BITS == 0 ? 2 : 8 / kTogether;               // that a thread takes at a time
constexpr int kLevels = BITS == 0 ? 1 : (1 << (BITS + 7) % 8) - 1;    // on either side of zero

struct Quantize {
    i64 codes_at, chunk_bytes;
    i32 block, columns;  // elements, and columns of them
    i32 block_bytes;     // of its codes
    i32 team;            // warps that share a block: 1, 2, 4 or 8
};

// The codes of column j, m columns being a block.
__device__ inline void unpack(const u8* p, i32 m, i32 j, u32 c[kTogether]) {
    if constexpr (BITS == 0) {
        u32 x = p[j];
#pragma unroll
        for (int k = 0; k < 5; k++, x /= 3) c[k] = x % 3;
    } else {
        u32 word = p[j];
        if constexpr (BITS == 3) word |= u32(p[m + j]) << 8 | u32(p[2 * m + j]) << 16;
#pragma unroll
        for (int k = 0; k < kTogether; k++) c[k] = word >> (BITS * k) & ((1u << BITS) - 1);
    }
}
__device__ inline void pack(u8* p, i32 m, i32 j, const u32 c[kTogether]) {
    u32 word = 0;
#pragma unroll
    for (int k = kTogether - 1; k >= 0; k--) word = BITS == 0 ? 3 * word + c[k] : word << BITS | c[k];
    p[j] = u8(word);
    if constexpr (BITS == 3) {
        p[m + j] = u8(word >> 8);
        p[2 * m + j] = u8(word >> 16);
    }
}

__device__ inline float value_of(u32 code, float step) { return (float(code) - float(kLevels)) * step; }

// Of the block `block` of a chunk: the width of a level, and the codes.
__device__ inline float* step_in(u8* chunk, i64 block) { return reinterpret_cast<float*>(chunk) + block; }
__device__ inline float step_in(const u8* chunk, i64 block) { return reinterpret_cast<const float*>(chunk)[block]; }
__device__ inline i64 codes_of(const Quantize& format, i64 block) { return format.codes_at + block * format.block_bytes; }
__device__ inline i64 block_of(const Quantize& format, i64 inside) { return u32(inside) / u32(format.block); }

// ---- values of a column; zero beyond the block's elements

template <class G> struct OwnValues {
    Terms<G> terms;

    __device__ void column(const Quantize& format, i32 count, i32 j, float v[kTogether]) const {
        float velocity;
#pragma unroll
        for (int k = 0; k < kTogether; k++) {
            const i32 i = k * format.columns + j;
            v[k] = i < count ? terms.value(i, velocity) : 0.f;
        }
    }
    // Read once more, from the cache.
    __device__ float velocity(i32 i) const { return terms.momentum * terms.u[i] + to_float(terms.g[i]); }
};

// error + weight * what each worker has sent, one after the other
struct SumOfWorkers {
    const float* error;  // of the block, or null
    const u8* pushed;
    i64 workers, block;
    float weight;

    __device__ float velocity(i32) const { return 0.f; }
    __device__ void column(const Quantize& format, i32 count, i32 j, float v[kTogether]) const {
#pragma unroll
        for (int k = 0; k < kTogether; k++) {
            const i32 i = k * format.columns + j;
            v[k] = error && i < count ? error[i] : 0.f;
        }
        if (!count) return;
        for (i64 w = 0; w < workers; w++) {
            const u8* chunk = pushed + w * format.chunk_bytes;
            const float step = step_in(chunk, block) * weight;
            u32 code[kTogether];
            unpack(chunk + codes_of(format, block), format.columns, j, code);
#pragma unroll
            for (int k = 0; k < kTogether; k++) v[k] = v[k] + value_of(code[k], step);
        }
#pragma unroll
        for (int k = 0; k < kTogether; k++)
            if (k * format.columns + j >= count) v[k] = 0.f;
    }
};

// ---- the two sweeps over a block

struct Scratch {
    float groups[kWarps][32];
    u32 largest[kWarps];
};

// The norm of a block, whose values are read once more: its rows are not its columns.
template <class Values>
__device__ inline float norm_of(const Quantize& format, const Team& team, const Values& values, Scratch& scratch) {
    OrderedSum sum{scratch.groups, team, 0.f};
    const i32 tile = kRow * 8 * team.warps;
    for (i32 from = 0; from < format.block; from += tile) {
        if (from) __syncthreads();  // all have read the last tile's
        float group = 0.f;
#pragma unroll
        for (int row = 0; row < 8; row++) {
            const i32 i = from + kRow * (8 * team.warp() + row) + lane_of_thread();
            if (i >= team.count) continue;
            const i32 k = i / format.columns;
            float v[kTogether], x = 0.f;
            values.column(format, i32(team.count), i - k * format.columns, v);
#pragma unroll
            for (int other = 0; other < kTogether; other++) x = other == k ? v[other] : x;
            group = group + x * x;
        }
        sum.add(group);
    }
    return sqrtf(sum.finish());
}

// The largest magnitude of a team, as an integer: so NaN is the largest of all. All threads of the block must call it.
__device__ inline float largest_of(const Team& team, u32 largest, Scratch& scratch) {
    for (int apart = 16; apart; apart /= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, apart));
    scratch.largest[warp_of_thread()] = largest;
    __syncthreads();
    for (int w = 0; w < team.warps; w++) largest = max(largest, scratch.largest[team.first_warp + w]);
    return float_of(largest);
}

// Of the element at a position: 16 bits of its row's words, over 2**16.
__device__ inline float uniform(const Philox& random, i64 position) {
    u32 x[4];
    random_words<OneWord>(random, u32(position / 8), x);
    const u32 word = position & 4 ? (position & 2 ? x[3] : x[2]) : (position & 2 ? x[1] : x[0]);
    return float(word >> (16 * (position & 1)) & 0xffffu) * 0x1p-16f;
}

// Writes the payload of a block, and error and velocity where there are any.
template <class Values>
__device__ inline void encode_block(const Quantize& format, const Team& team, const Values& values, const Philox& random,
                                    u8* chunk, float* error, float* velocity, Scratch& scratch) {
    const i32 m = format.columns, stride = 32 * team.warps, tile = stride * kColumns, count = i32(team.count);
    float v[kColumns][kTogether];
    auto read = [&](i32 from) {
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
            const i32 j = from + c * stride + team.thread();
            values.column(format, j < m ? count : 0, j, v[c]);
        }
    };
    u32 largest = 0;
    for (i32 from = 0; from < m; from += tile) {
        read(from);
#pragma unroll
        for (int c = 0; c < kColumns; c++)
#pragma unroll
            for (int k = 0; k < kTogether; k++) largest = max(largest, magnitude(v[c][k]));
    }
    const float scale = L2 ? norm_of(format, team, values, scratch) : largest_of(team, largest, scratch);
    if (!count) return;
    const bool finite = scale <= float_of(kMaxFinite);
    const float levels = float(kLevels), step = fminf(flush(scale / levels), widest_step(levels));
    const float shrink = shrink_of(scale), by = fminf(levels / (scale * shrink), float_of(kMaxFinite));
    const i64 block = block_of(format, team.inside);
    if (team.leads()) *step_in(chunk, block) = finite ? step : float_of(kNaN);
    if (!finite) return;
    for (i32 from = 0; from < m; from += tile) {
        if (m > tile) read(from);
        u32 zeros = 0;  // a bit for each element whose level is zero
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
            const i32 j = from + c * stride + team.thread();
            if (j >= m) continue;
            u32 code[kTogether];
#pragma unroll
            for (int k = 0; k < kTogether; k++) {
                const i32 i = k * m + j;
                const float x = v[c][k], r = STOCHASTIC ? uniform(random, team.position + i) : 0.5f;
                const float level = truncf(fminf(float_of(magnitude(x)) * shrink * by + r, levels));
                const float signed_level = with_sign_of(level, x);
                code[k] = i < format.block ? u32(signed_level + levels) : 0u;
                zeros |= u32(level == 0.f) << (c * kTogether + k);
                if (error && i < count) error[i] = x - signed_level * step;
            }
            pack(chunk + codes_of(format, block), m, j, code);
        }
        if (!velocity) continue;
#pragma unroll 1
        for (int q = 0; q < kColumns * kTogether; q++) {  // one at a time: registers are dear
            const i32 j = from + q / kTogether * stride + team.thread(), i = q % kTogether * m + j;
            if (j < m && i < count) velocity[i] = zeros >> q & 1 ? values.velocity(i) : 0.f;
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
quantize_encode(Quantize format, Layout layout, Tensors gradients, FeedbackState state, Philox random, u8* chunks) {
    __shared__ Scratch scratch;
    const Team team(layout, format.block, format.team);
    with_element_type(gradients.dtype, [&](auto* type) {
        using G = typename Pointed<decltype(type)>::type;
        const OwnValues<G> own{terms_at(type, gradients, state, team.place, team.position)};
        encode_block(format, team, own, random, chunks + blockIdx.y * format.chunk_bytes,
                     state.error ? state.error + team.position : nullptr,
                     state.velocity ? state.velocity + team.position : nullptr, scratch);
    });
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
quantize_serve(Quantize format, Layout layout, const u8* pushed, i64 workers, float weight, float* error, Philox random,
               u8* chunk) {
    __shared__ Scratch scratch;
    const Team team(layout, format.block, format.team);
    float* e = error ? error + team.position : nullptr;
    const SumOfWorkers of_all{e, pushed, workers, block_of(format, team.inside), weight};
    encode_block(format, team, of_all, random, chunk, e, nullptr, scratch);
}

// ---- what arrives

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
quantize_decode(Quantize format, Layout layout, const u8* chunks, Tensors gradients) {
    const Team team(layout, format.block, format.team);
    if (!team.count) return;
    const i64 block = block_of(format, team.inside);
    const u8* chunk = chunks + blockIdx.y * format.chunk_bytes;
    const float step = step_in(chunk, block);
    with_element_type(gradients.dtype, [&](auto* type) {
        auto* to = element(type, gradients, team.place);
        for (i32 j = team.thread(); j < format.columns; j += 32 * team.warps) {
            u32 code[kTogether];
            unpack(chunk + codes_of(format, block), format.columns, j, code);
#pragma unroll
            for (int k = 0; k < kTogether; k++) {
                const i32 i = k * format.columns + j;
                if (i < team.count) from_float(value_of(code[k], step), to + i);
            }
        }
    });
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
quantize_accumulate(Quantize format, Layout layout, const u8* pushed, i64 workers, float weight, float* total) {
    const Team team(layout, format.block, format.team);
    float* to = total + team.position;
    const SumOfWorkers of_all{to, pushed, workers, block_of(format, team.inside), weight};
    for (i32 j = team.thread(); j < format.columns && team.count; j += 32 * team.warps) {
        float v[kTogether];
        of_all.column(format, i32(team.count), j, v);
#pragma unroll
        for (int k = 0; k < kTogether; k++)
            if (k * format.columns + j < team.count) to[k * format.columns + j] = v[k];
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
quantize_nonfinite_mask(Quantize format, Layout layout, const u8* chunks, u32* mask) {
    const Row row(layout);
    if (row.inside >= layout.shard_numel) return;
    const u8* chunk = chunks + blockIdx.y * format.chunk_bytes;
    const bool finite = !row.count || is_finite(step_in(chunk, block_of(format, row.inside)));
    mask[row.position / kRow] = finite ? 0 : kAllLanes;
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
quantize_rollback(Quantize format, Layout layout, const u8* chunks, const u32* mask, Tensors gradients, FeedbackState state,
                   i64 sparse) {
    const Row row(layout);
    if (!row.count || !mask[row.position / kRow]) return;
    const u8* chunk = chunks + blockIdx.y * format.chunk_bytes;
    const i64 block = block_of(format, row.inside);
    const i32 first = i32(row.inside - block * format.block);
    const float step = step_in(chunk, block);
    with_element_type(gradients.dtype, [&](auto* type) {
        roll_back(type, row, mask[row.position / kRow], gradients, state, sparse, [&](int bit) {
            const i32 at = (first + bit) / format.columns;
            u32 code[kTogether], own = 0;
            unpack(chunk + codes_of(format, block), format.columns, first + bit - at * format.columns, code);
#pragma unroll
            for (int k = 0; k < kTogether; k++) own = k == at ? code[k] : own;
            return value_of(own, step);
        });
    });
}
