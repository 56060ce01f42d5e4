// The k largest magnitudes of a shard, exactly; ties go to the lowest index. Runs, entries and their bits: kernels/formats.py.
//
// A pass is six launches, and no launch waits for another's blocks:
//   gather   the only dense pass: v over the error, and the candidates, which are at least as large as a guess, to a pool;
//   narrow   three times: which magnitude is the k-th largest, 13 bits at a time, among the candidates or, where there are
//            fewer than k or more than there is room for, among all elements. Of candidates the first one finds it, and the
//            others return at once;
//   place    how many entries each run has, and so where they lie in the chunk;
//   emit     the entries, and what is left in the error.
// Candidates lie in the pool in the order in which blocks came to it. That does not matter: an entry's rank is the number of
// bits before its own in a bitmap of its run.

constexpr i64 kRun = 65536;
constexpr u32 kEntries = 64;  // that share a magnitude
constexpr u32 kAllNotFinite = 0xffffffffu;
constexpr int kRunWords = int(kRun / 32), kThreadWords = kRunWords / kThreads;
constexpr int kRunTiles = int(kRun / kTile);

constexpr int kCoarseBins = 2048, kCoarseShift = 13;  // of candidates, over two octaves from the guess on
constexpr int kFineBits = 13, kFineBins = 1 << kFineBits;

// How far below the last k-th magnitude the next is guessed, in units of its last place, an octave being 2^23.
constexpr u32 kFirstMargin = 1u << 20, kLeastMargin = 1u << 16, kMostMargin = 1u << 23;

enum Values { kFull, kHalf, kSigns };

struct TopK {
    i64 k, values, low_bits, scales_at, upper_at, low_at, values_at, chunk_bytes;

    __device__ u32 width() const { return u32(low_bits) + (values == kSigns); }
    __device__ u32 upper_bytes(i64 run_numel, u32 entries) const {
        const i64 rows = (run_numel + (1ll << low_bits) - 1) >> low_bits;
        return u32((rows + (low_bits ? entries : 0) + 7) / 8);
    }
    __device__ u32 low_bytes(u32 entries) const { return u32((u64(entries) * width() + 7) / 8); }
};

// What is looked at for a shard's entries.
enum Source { kNothing, kCandidates, kAll, kNotFinite, kEveryNotFinite };

// The k-th largest magnitude lies in low .. low + 2^bits - 1, as the remaining-th largest in there.
struct Choice { u32 source, low, bits, remaining; };

struct Shard {
    u32 guess, margin;      // from step to step; no guess: 0
    u32 found, not_finite;  // candidates, and elements that are not finite
    u32 arrived;            // blocks that are through
    Choice choice;
};

// Where a tile's candidates begin, where its elements that are not finite do, and in the lower half how many of the former.
struct Tile { u32 candidates, not_finite, counts; };

struct Run { u32 above, equal, count, entries, scales, upper, low; };  // equal: at last those of them that are sent

// What is kept on the device between launches (TopKWork in ds_horovod/kernels/cuda.py); zero before the first pass.
struct Work {
    const i64* elements;  // of each shard, padding not counted
    Shard* shards;
    u32 *coarse, *fine;   // bins of each shard; zero between launches
    Tile* tiles;
    Run* runs;
    u32* positions;       // the pool of each shard
    float* values;
    u32* not_finite;      // positions, up to k of each shard
    u32* sorted_offsets;  // entries of each shard, up to k, in order
    float* sorted_values;
    i64 capacity;         // of a pool; none: nothing is guessed

    __device__ u32 needed(const TopK& format, i64 shard) const { return u32(min(format.k, elements[shard])); }
};

// ---- elements

struct Spot {
    i64 position;  // in the flat array
    Place place;
    int count;     // of 4 neighbours; none: padding, or past the shard's end
};
__device__ inline Spot spot_at(const Layout& layout, i64 inside) {
    Spot at{i64(blockIdx.y) * layout.shard_numel + inside, {0, 0, 0}, 0};
    if (inside >= layout.shard_numel) return at;
    at.place = place_at(layout, at.position);
    at.count = int(min(at.place.count, 4ll));
    return at;
}

// v, after the dense pass.
__device__ inline void load_values(const Tensors& gradients, const FeedbackState& state, const Spot& at, float v[4]) {
    const float* kept = state.total ? state.total : state.error;
    if (kept) return load(kept + at.position, at.count, v);
    with_element_type(gradients.dtype, [&](auto* type) { load(element(type, gradients, at.place), at.count, v); });
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = v[j] + 0.f;
}

__device__ inline i64 run_numel(const Layout& layout, i64 run) { return min(kRun, layout.shard_numel - run * kRun); }

// visit(offset, value) for what is looked at in the run blockIdx.x, by all threads of the block, in any order.
template <class Visit>
__device__ inline void each_of_run(const TopK& format, const Layout& layout, const Tensors& gradients,
                                   const FeedbackState& state, const Work& work, u32 source, const Visit& visit) {
    const i64 shard = blockIdx.y, run = blockIdx.x;
    if (source == kAll) {
        for (i64 i = 4 * i64(threadIdx.x); i < run_numel(layout, run); i += 4 * kThreads) {
            const Spot at = spot_at(layout, run * kRun + i);
            if (!at.count) continue;
            float v[4];
            load_values(gradients, state, at, v);
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (j < at.count) visit(u32(i + j), v[j]);
        }
    } else if (source != kNothing) {
        const i64 tiles = ceil_div(layout.shard_numel, kTile), first = run * kRunTiles;
        for (i64 t = first + warp_of_thread(); t < min(first + kRunTiles, tiles); t += kWarps) {
            const Tile tile = work.tiles[shard * tiles + t];
            if (source == kCandidates) {
                const i64 begin = shard * work.capacity + tile.candidates, end = begin + (tile.counts & 0xffffu);
                for (i64 c = begin + lane_of_thread(); c < end; c += 32) visit(work.positions[c] % u32(kRun), work.values[c]);
            } else {
                const i64 begin = shard * format.k + tile.not_finite, end = begin + (tile.counts >> 16);
                for (i64 c = begin + lane_of_thread(); c < end; c += 32) visit(work.not_finite[c] % u32(kRun), float_of(kNaN));
            }
        }
    }
}

// ---- over a block of threads

// What the threads before this one have, and in `all` what all have. All threads must call it.
template <class T> __device__ inline T sum_before(T x, T totals[kWarps], T* all) {
    T sum = x;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const T other = __shfl_up_sync(kAllLanes, sum, d);
        if (lane_of_thread() >= d) sum += other;
    }
    if (lane_of_thread() == 31) totals[warp_of_thread()] = sum;
    __syncthreads();
    T before = sum - x;
    *all = 0;
    for (int w = 0; w < kWarps; w++) {
        if (w < warp_of_thread()) before += totals[w];
        *all += totals[w];
    }
    __syncthreads();
    return before;
}

// Whether this is the shard's last block to get here; it sees what the others have written. All threads must call it.
__device__ inline bool is_last_block(Shard& shard, u32 totals[kWarps]) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) totals[0] = atomicAdd(&shard.arrived, 1u);
    __syncthreads();
    if (totals[0] + 1 < gridDim.x) return false;
    __syncthreads();
    __threadfence();
    if (threadIdx.x == 0) shard.arrived = 0;
    return true;
}

// In which bin the remaining-th largest lies, and as how manieth. read(bin): how many a bin holds. All threads must call it.
struct Bin { u32 bin, remaining; };
template <int kBins, class Read> __device__ inline Bin find_bin(u32 remaining, u32 totals[kWarps], const Read& read) {
    constexpr int kEach = kBins / kThreads;
    const int top = kBins - 1 - kEach * int(threadIdx.x);
    u32 held[kEach], sum = 0, all;
#pragma unroll
    for (int i = 0; i < kEach; i++) sum += held[i] = read(top - i);
    u32 before = sum_before(sum, totals, &all);
    if (before < remaining && remaining <= before + sum) {
        bool here = false;
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            if (here) continue;
            here = remaining <= before + held[i];
            if (here) totals[0] = u32(top - i), totals[1] = remaining - before;
            before += held[i];
        }
    }
    __syncthreads();
    const Bin found{totals[0], totals[1]};
    __syncthreads();
    return found;
}

// ---- encode

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
top_k_gather(TopK format, Layout layout, Tensors gradients, FeedbackState state, Work work) {
    __shared__ u32 totals[kWarps];
    __shared__ Tile tile;
    const i64 shard = blockIdx.y, inside = i64(blockIdx.x) * kTile + 4 * threadIdx.x;
    Shard& search = work.shards[shard];
    const u32 least = search.guess ? search.guess : kMaxFinite + 1;
    float v[2][4];
    u32 hits = 0, bad = 0;
    with_element_type(gradients.dtype, [&](auto* type) {
#pragma unroll
        for (int q = 0; q < 2; q++) {
            const Spot at = spot_at(layout, inside + q * (kTile / 2));
            if (!at.count) continue;
            float velocity[4];
            terms_at(type, gradients, state, at.place, at.position).values(0, at.count, v[q], velocity);
            u32 not_finite = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (!state.error && !state.total) v[q][j] = v[q][j] + 0.f;
                if (j >= at.count) continue;
                if (!is_finite(v[q][j])) not_finite |= 1u << j;
                else if (magnitude(v[q][j]) >= least) hits |= 1u << (4 * q + j);
            }
            bad |= not_finite << 4 * q;
            if (gradients.dtype == kNone || !state.error) continue;
            if (!not_finite) {
                store(state.error + at.position, at.count, v[q]);
                if (state.velocity) store(state.velocity + at.position, at.count, velocity);
                continue;
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (j >= at.count || not_finite >> j & 1) continue;
                state.error[at.position + j] = v[q][j];
                if (state.velocity) state.velocity[at.position + j] = velocity[j];
            }
        }
    });

    u32 all;
    const u32 before = sum_before(u32(__popc(hits)) | u32(__popc(bad)) << 16, totals, &all);
    if (threadIdx.x == 0) {
        tile = {0, 0, all};
        if (all & 0xffffu) tile.candidates = atomicAdd(&search.found, all & 0xffffu);
        if (all >> 16) tile.not_finite = atomicAdd(&search.not_finite, all >> 16);
        work.tiles[shard * gridDim.x + blockIdx.x] = tile;
    }
    if (!all) return;
    __syncthreads();
    i64 next = i64(tile.candidates) + (before & 0xffffu), next_bad = i64(tile.not_finite) + (before >> 16);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 position = u32(inside + (i / 4) * (kTile / 2) + i % 4);
        const float x = v[i / 4][i % 4];
        if (hits >> i & 1) {
            if (next < work.capacity) {
                work.positions[shard * work.capacity + next] = position;
                work.values[shard * work.capacity + next] = x;
            }
            next++;
            const u32 bin = min((magnitude(x) - least) >> kCoarseShift, u32(kCoarseBins - 1));
            atomicAdd(&work.coarse[shard * kCoarseBins + bin], 1u);
        } else if (bad >> i & 1) {
            if (next_bad < format.k) work.not_finite[shard * format.k + next_bad] = position;
            next_bad++;
        }
    }
}

// What the dense pass leaves to choose from.
__device__ inline Choice first_choice(const TopK& format, const Work& work, u32 totals[kWarps]) {
    const i64 shard = blockIdx.y;
    const Shard& search = work.shards[shard];
    const u32 need = work.needed(format, shard);
    if (search.not_finite) return {u32(search.not_finite > format.k ? kEveryNotFinite : kNotFinite), 0, 0, 0};
    if (!need) return {kNothing, 0, 0, 0};
    if (search.found < need || search.found > work.capacity) return {kAll, 0, 31, need};
    const Bin found = find_bin<kCoarseBins>(need, totals, [&](int bin) { return work.coarse[shard * kCoarseBins + bin]; });
    const u32 bits = found.bin == kCoarseBins - 1 ? 31 : kCoarseShift;  // the last bin has no end
    return {kCandidates, search.guess + (found.bin << kCoarseShift), bits, found.remaining};
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
top_k_narrow(TopK format, Layout layout, Tensors gradients, FeedbackState state, Work work, i64 first) {
    __shared__ u32 bins[kFineBins];
    __shared__ u32 totals[kWarps];
    const i64 shard = blockIdx.y;
    Shard& search = work.shards[shard];
    const Choice choice = first ? first_choice(format, work, totals) : search.choice;
    if (!choice.bits) {
        if (first && blockIdx.x == 0 && threadIdx.x == 0) search.choice = choice;
        return;
    }
    for (int bin = int(threadIdx.x); bin < kFineBins; bin += kThreads) bins[bin] = 0;
    __syncthreads();
    const u32 shift = choice.bits > kFineBits ? choice.bits - kFineBits : 0;
    const auto take = [&](u32, float v) {
        const u32 above = magnitude(v) - choice.low;
        if (!(above >> choice.bits)) atomicAdd(&bins[above >> shift], 1u);
    };
    if (choice.source == kCandidates) {  // in equal parts, whichever runs they are from
        const i64 begin = i64(search.found) * blockIdx.x / gridDim.x, end = i64(search.found) * (blockIdx.x + 1ll) / gridDim.x;
        for (i64 c = begin + threadIdx.x; c < end; c += kThreads) take(0, work.values[shard * work.capacity + c]);
    } else {
        each_of_run(format, layout, gradients, state, work, choice.source, take);
    }
    __syncthreads();
    u32* fine = work.fine + shard * kFineBins;
    for (int bin = int(threadIdx.x); bin < kFineBins; bin += kThreads)
        if (bins[bin]) atomicAdd(&fine[bin], bins[bin]);
    if (!is_last_block(search, totals)) return;
    const Bin found = find_bin<kFineBins>(choice.remaining, totals, [&](int bin) { return atomicExch(&fine[bin], 0u); });
    const u32 low = choice.low + (found.bin << shift);
    // A zero is not sent: as a sign it would not stay one.
    if (threadIdx.x == 0) search.choice = {choice.source, low, shift, low || shift ? found.remaining : 0};
}

// Of the shard's runs: which entries, and where. All threads of one block call it.
__device__ inline void place_runs(const TopK& format, const Layout& layout, const Work& work, const Choice& choice,
                                  u32 totals[kWarps], u8* chunk) {
    const i64 runs = gridDim.x, each = ceil_div(runs, kThreads);
    const i64 begin = min(each * threadIdx.x, runs), end = min(begin + each, runs);
    Run* of_shard = work.runs + i64(blockIdx.y) * runs;
    u32 equal = 0, all;
    for (i64 r = begin; r < end; r++) equal += __ldcg(&of_shard[r].equal);
    u32 before = sum_before(equal, totals, &all);
    Run at{};
    for (i64 r = begin; r < end; r++) {
        Run& run = of_shard[r];
        const u32 ties = __ldcg(&run.equal), left = choice.remaining > before ? choice.remaining - before : 0;
        before += ties;
        run.equal = min(ties, left);
        run.count = __ldcg(&run.above) + run.equal;
        at.entries += run.count;
        at.scales += u32(ceil_div(run.count, kEntries));
        at.upper += format.upper_bytes(run_numel(layout, r), run.count);
        at.low += format.low_bytes(run.count);
    }
    at.entries = sum_before(at.entries, totals, &all);
    at.scales = sum_before(at.scales, totals, &all);
    at.upper = sum_before(at.upper, totals, &all);
    at.low = sum_before(at.low, totals, &all);
    for (i64 r = begin; r < end; r++) {
        Run& run = of_shard[r];
        run.entries = at.entries, run.scales = at.scales, run.upper = at.upper, run.low = at.low;
        at.entries += run.count;
        at.scales += u32(ceil_div(run.count, kEntries));
        at.upper += format.upper_bytes(run_numel(layout, r), run.count);
        at.low += format.low_bytes(run.count);
        reinterpret_cast<u32*>(chunk)[r] = choice.source == kEveryNotFinite && r == 0 ? kAllNotFinite : run.count;
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
top_k_place(TopK format, Layout layout, Tensors gradients, FeedbackState state, Work work, u8* chunks) {
    __shared__ u32 totals[kWarps];
    const i64 shard = blockIdx.y;
    Shard& search = work.shards[shard];
    const Choice choice = search.choice;
    u32 above = 0, equal = 0;
    if (choice.source == kEveryNotFinite) above = blockIdx.x == 0 && threadIdx.x == 0;
    else
        each_of_run(format, layout, gradients, state, work, choice.source, [&](u32, float v) {
            above += magnitude(v) > choice.low;
            equal += magnitude(v) == choice.low;
        });
    u32 all_above, all_equal;
    sum_before(above, totals, &all_above);
    sum_before(equal, totals, &all_equal);
    if (threadIdx.x == 0) {
        Run& run = work.runs[shard * gridDim.x + blockIdx.x];
        run.above = all_above;
        run.equal = all_equal;
    }
    if (!is_last_block(search, totals)) return;
    place_runs(format, layout, work, choice, totals, chunks + shard * format.chunk_bytes);
    for (int bin = int(threadIdx.x); bin < kCoarseBins; bin += kThreads) work.coarse[shard * kCoarseBins + bin] = 0;
    if (threadIdx.x != 0) return;
    if (choice.source == kCandidates || choice.source == kAll) {
        // A wider margin where candidates were too few, a narrower one where they were more than twice what is needed.
        const u32 need = work.needed(format, shard);
        u32 margin = search.margin ? search.margin : kFirstMargin;
        if (search.guess && search.found < need) margin = min(2 * margin, kMostMargin);
        else if (search.guess && search.found / 2 > need) margin = max(margin / 2, kLeastMargin);
        search.margin = margin;
        search.guess = work.capacity ? (choice.low > margin ? choice.low - margin : 1) : 0;  // zeros are no candidates
    }
    search.found = search.not_finite = 0;
}

// A bitmap of a run, with the number of bits before each word.
struct Ranks {
    u32* words;
    u16* before;

    // All threads must call it; returns the number of bits.
    __device__ u32 count(u32 totals[kWarps]) const {
        const int first = kThreadWords * int(threadIdx.x);
        u32 here = 0, all;
#pragma unroll
        for (int i = 0; i < kThreadWords; i++) here += __popc(words[first + i]);
        u32 sum = sum_before(here, totals, &all);
#pragma unroll
        for (int i = 0; i < kThreadWords; i++) {
            before[first + i] = u16(sum);
            sum += __popc(words[first + i]);
        }
        __syncthreads();
        return all;
    }
    __device__ bool has(u32 offset) const { return words[offset / 32] >> offset % 32 & 1; }
    __device__ u32 rank(u32 offset) const {
        return before[offset / 32] + __popc(words[offset / 32] & ((1u << offset % 32) - 1));
    }
    __device__ void set(u32 offset) const { atomicOr(&words[offset / 32], 1u << offset % 32); }
    __device__ void clear() const {
        for (int w = int(threadIdx.x); w < kRunWords; w += kThreads) words[w] = 0;
    }
};

__device__ inline Half half_of(float v) {
    Half h;
    from_float(v, &h);
    return h;
}

// The lower bits of 8 entries are whole bytes.
__device__ inline void write_low(const TopK& format, const u32* offsets, const float* values, u32 first, u32 count, u8* low) {
    const u32 width = format.width(), b = u32(format.low_bits);
    u8* out = low + i64(first / 8) * width;
    u32 pending = 0, bits = 0;
    for (u32 i = first; i < min(first + 8, count); i++) {
        u32 field = offsets[i] & ((1u << b) - 1);
        if (format.values == kSigns) field |= bits_of(values[i]) >> 31 << b;
        pending |= field << bits;
        for (bits += width; bits >= 8; bits -= 8, pending >>= 8) *out++ = u8(pending);
    }
    if (bits) *out = u8(pending);
}

// The mean magnitude of up to kEntries entries, two a lane; summed as rows of csrc/cpu/sums.h are.
__device__ inline float mean_magnitude(const float* values, u32 count) {
    const u32 lane = u32(lane_of_thread());
    float sum = 0.f;
    if (lane < count) sum = sum + float_of(magnitude(values[lane]));
    if (lane + 32 < count) sum = sum + float_of(magnitude(values[lane + 32]));
#pragma unroll
    for (int i = 0; i < 5; i++) {
        const int apart[5] = {8, 16, 1, 2, 4};
        sum = sum + __shfl_xor_sync(kAllLanes, sum, apart[i]);
    }
    const float mean = flush(sum / float(count)), largest = float_of(0x7f7f0000u);
    return mean > largest ? largest : mean;
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
top_k_emit(TopK format, Layout layout, Tensors gradients, FeedbackState state, Work work, u8* chunks) {
    __shared__ u32 chosen_words[kRunWords], equal_words[kRunWords];
    __shared__ u16 chosen_before[kRunWords];
    __shared__ u32 totals[kWarps];
    const i64 shard = blockIdx.y, start = shard * layout.shard_numel + i64(blockIdx.x) * kRun;
    const Choice choice = work.shards[shard].choice;
    const Run run = work.runs[shard * gridDim.x + blockIdx.x];
    if (state.total && state.error && choice.source != kEveryNotFinite)  // which gather could not know
        for (i64 i = 4 * i64(threadIdx.x); i < run_numel(layout, blockIdx.x); i += 4 * kThreads) {
            const Spot at = spot_at(layout, i64(blockIdx.x) * kRun + i);
            float v[4];
            load(state.total + at.position, at.count, v);
            if (is_finite(v[0]) && is_finite(v[1]) && is_finite(v[2]) && is_finite(v[3])) {
                store(state.error + at.position, at.count, v);
                continue;
            }
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (j < at.count && is_finite(v[j])) state.error[at.position + j] = v[j];
        }
    if (!run.count) return;

    const Ranks chosen{chosen_words, chosen_before}, equal{equal_words, nullptr};
    chosen.clear();
    equal.clear();
    __syncthreads();
    if (choice.source == kEveryNotFinite) {
        if (threadIdx.x == 0) chosen.set(0);
    } else {
        each_of_run(format, layout, gradients, state, work, choice.source, [&](u32 offset, float v) {
            if (magnitude(v) > choice.low) chosen.set(offset);
            else if (magnitude(v) == choice.low) equal.set(offset);
        });
    }
    __syncthreads();
    const int first_word = kThreadWords * int(threadIdx.x);
    u32 ties = 0, all;
    for (int w = first_word; w < first_word + kThreadWords; w++) ties += __popc(equal_words[w]);
    u32 before = sum_before(ties, totals, &all);
    for (int w = first_word; w < first_word + kThreadWords; w++)
        for (u32 bits = equal_words[w]; bits && before < run.equal; bits &= bits - 1, before++)
            chosen_words[w] |= bits & (0u - bits);
    chosen.count(totals);

    u32* offsets = work.sorted_offsets + shard * format.k + run.entries;
    float* values = work.sorted_values + shard * format.k + run.entries;
    if (choice.source == kEveryNotFinite) {
        if (threadIdx.x == 0) offsets[0] = 0, values[0] = float_of(kNaN);
    } else {
        each_of_run(format, layout, gradients, state, work, choice.source, [&](u32 offset, float v) {
            if (!chosen.has(offset)) return;
            const u32 rank = chosen.rank(offset);
            offsets[rank] = offset;
            values[rank] = v;
        });
    }
    __syncthreads();

    u8* chunk = chunks + shard * format.chunk_bytes;
    const bool settle = choice.source == kCandidates || choice.source == kAll;
    const u32 b = u32(format.low_bits);
    u8* upper = chunk + format.upper_at + run.upper;
    const u32 skipped = 8 * u32(u64(upper) % 4);  // bits of the first word that are another run's
    u32* upper_words = reinterpret_cast<u32*>(upper - skipped / 8);
    for (u32 i = threadIdx.x; i < run.count; i += kThreads) {
        const u32 bit = skipped + (offsets[i] >> b) + (b ? i : 0);
        atomicOr(&upper_words[bit / 32], 1u << bit % 32);
        if (settle && state.velocity) state.velocity[start + offsets[i]] = 0.f;
        if (format.values == kSigns) continue;
        float arrives = values[i];
        if (format.values == kHalf) {
            const Half half = half_of(values[i]);
            reinterpret_cast<Half*>(chunk + format.values_at)[run.entries + i] = half;
            arrives = to_float(half);
        } else {
            reinterpret_cast<float*>(chunk + format.values_at)[run.entries + i] = arrives;
        }
        if (settle && state.error) state.error[start + offsets[i]] = values[i] - arrives;
    }
    if (format.width())
        for (u32 i = 8 * threadIdx.x; i < run.count; i += 8 * kThreads)
            write_low(format, offsets, values, i, run.count, chunk + format.low_at + run.low);
    if (format.values != kSigns) return;
    BFloat16* scales = reinterpret_cast<BFloat16*>(chunk + format.scales_at) + run.scales;
    for (u32 group = u32(warp_of_thread()); group * kEntries < run.count; group += kWarps) {
        const u32 first = group * kEntries, count = min(run.count - first, kEntries);
        BFloat16 scale;
        from_float(mean_magnitude(values + first, count), &scale);
        if (lane_of_thread() == 0) scales[group] = scale;
        if (!settle || !state.error) continue;
        for (u32 i = first + u32(lane_of_thread()); i < first + count; i += 32)
            state.error[start + offsets[i]] = values[i] - with_sign_of(to_float(scale), values[i]);
    }
}

// ---- decode

// A run of a chunk, opened by all threads of a block. What is not sound is NaN altogether.
struct OpenRun {
    const TopK& format;
    const u8* chunk;
    Ranks ranks;
    u32 count, entries, scales, low;
    bool sound;

    __device__ u32 field(u32 entry) const {
        const u64 bit = u64(entry) * format.width();
        const u8* p = chunk + format.low_at + low + bit / 8;  // fields end before 8 unused bytes
        return ((u32(p[0]) | u32(p[1]) << 8 | u32(p[2]) << 16) >> bit % 8) & ((1u << format.width()) - 1);
    }
    __device__ float value(u32 rank) const {
        if (format.values == kFull) return reinterpret_cast<const float*>(chunk + format.values_at)[entries + rank];
        if (format.values == kHalf) return to_float(reinterpret_cast<const Half*>(chunk + format.values_at)[entries + rank]);
        const float scale = to_float(reinterpret_cast<const BFloat16*>(chunk + format.scales_at)[scales + rank / kEntries]);
        return field(rank) >> format.low_bits ? -scale : scale;
    }
    // Zero where nothing was sent.
    __device__ float at(u32 offset) const {
        if (!sound) return float_of(kNaN);
        return ranks.has(offset) ? value(ranks.rank(offset)) : 0.f;
    }

    __device__ void open(const Layout& layout, i64 run, u64 totals[kWarps], u32 few_totals[kWarps]) {
        const i64 runs = ceil_div(layout.shard_numel, kRun);
        const u32* counts = reinterpret_cast<const u32*>(chunk);
        const u32 most = u32(min(format.k, kRun));
        u64 of_all = 0;
        u32 before[4] = {};  // entries, scales, bytes of upper and lower bits
#pragma unroll 1
        for (i64 r = threadIdx.x; r < runs; r += kThreads) {
            const u32 n = counts[r];
            of_all += n <= most ? n : u64(format.k) + 1;
            if (r >= run || n > most) continue;
            before[0] += n;
            before[1] += u32(ceil_div(n, kEntries));
            before[2] += format.upper_bytes(run_numel(layout, r), n);
            before[3] += format.low_bytes(n);
        }
        sum_before(of_all, totals, &of_all);
        sound = of_all <= u64(format.k);
        if (!sound) return;
#pragma unroll
        for (int i = 0; i < 4; i++) sum_before(before[i], few_totals, &before[i]);
        count = counts[run], entries = before[0], scales = before[1], low = before[3];
        ranks.clear();  // before the barriers below
        const u8* upper = chunk + format.upper_at + before[2];
        const u32 bytes = format.upper_bytes(run_numel(layout, run), count), b = u32(format.low_bits);
        u32 seen = 0, all;
#pragma unroll 1
        for (u32 base = 0; base < bytes; base += 4 * kThreads) {
            const u32 byte = base + 4 * threadIdx.x;
            u32 word = 0;
            for (u32 i = 0; i < 4; i++)
                if (byte + i < bytes) word |= u32(upper[byte + i]) << 8 * i;
            u32 entry = seen + sum_before(u32(__popc(word)), few_totals, &all);
#pragma unroll 1
            for (; word && entry < count; word &= word - 1, entry++) {
                const u32 row = 8 * byte + u32(__ffs(int(word))) - 1 - (b ? entry : 0);
                const u64 offset = u64(row) << b | (b ? field(entry) & ((1u << b) - 1) : 0);
                if (offset < u64(run_numel(layout, run))) ranks.set(u32(offset));
            }
            seen += all;
        }
        __syncthreads();
        sound = ranks.count(few_totals) == count && seen == count;
    }
};

#define DECLARE_OPEN_RUN(run)                                 \
    __shared__ u32 words_[kRunWords];                         \
    __shared__ u16 before_[kRunWords];                        \
    __shared__ u64 totals_[kWarps];                           \
    __shared__ u32 few_totals_[kWarps];                       \
    OpenRun run{format, chunks, {words_, before_}, 0, 0, 0, 0, false}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
top_k_decode(TopK format, Layout layout, const u8* chunks, Tensors gradients) {
    DECLARE_OPEN_RUN(run);
    run.chunk += i64(blockIdx.y) * format.chunk_bytes;
    run.open(layout, blockIdx.x, totals_, few_totals_);
    with_element_type(gradients.dtype, [&](auto* type) {
        for (i64 i = 4 * i64(threadIdx.x); i < run_numel(layout, blockIdx.x); i += 4 * kThreads) {
            const Spot at = spot_at(layout, i64(blockIdx.x) * kRun + i);
            if (!at.count) continue;
            float v[4];
#pragma unroll
            for (int j = 0; j < 4; j++) v[j] = run.at(u32(i + j));
            store(element(type, gradients, at.place), at.count, v);
        }
    });
}

// The workers' chunks for one shard, one after the other.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
top_k_accumulate(TopK format, Layout layout, const u8* chunks, i64 workers, float weight, float* total) {
    DECLARE_OPEN_RUN(run);
    const i64 start = i64(blockIdx.x) * kRun;
    for (i64 w = 0; w < workers; w++, run.chunk += format.chunk_bytes) {
        run.open(layout, blockIdx.x, totals_, few_totals_);
#pragma unroll 1
        for (int i = int(threadIdx.x); i < kRunWords; i += kThreads) {
            if (run.sound) {
#pragma unroll 1
                for (u32 bits = words_[i]; bits; bits &= bits - 1) {
                    const u32 offset = 32 * u32(i) + u32(__ffs(int(bits))) - 1;
                    total[start + offset] = total[start + offset] + run.value(run.ranks.rank(offset)) * weight;
                }
            } else if (start + 32ll * i < layout.shard_numel) {
                const Place place = place_at(layout, start + 32ll * i);
                for (int j = 0; j < min(place.count, 32ll); j++) total[start + 32 * i + j] = float_of(kNaN);
            }
        }
    }
}

// Blocks of rows, several of which are of one run.
constexpr int kRunBlocks = kRunWords / kThreads;
__device__ inline u32 row_in_run() { return blockIdx.x % kRunBlocks * kThreads + threadIdx.x; }

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
top_k_nonfinite_mask(TopK format, Layout layout, const u8* chunks, u32* mask) {
    DECLARE_OPEN_RUN(run);
    run.chunk += i64(blockIdx.y) * format.chunk_bytes;
    run.open(layout, blockIdx.x / kRunBlocks, totals_, few_totals_);
    const Row row(layout);
    if (row.inside >= layout.shard_numel) return;
    u32 bits = run.sound ? 0 : kAllLanes;
#pragma unroll 1
    for (u32 left = run.sound ? words_[row_in_run()] : 0; left; left &= left - 1) {
        const u32 j = u32(__ffs(int(left))) - 1;
        if (!is_finite(run.at(32 * row_in_run() + j))) bits |= 1u << j;
    }
    mask[row.position / kRow] = bits;
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
top_k_rollback(TopK format, Layout layout, const u8* chunks, const u32* mask, Tensors gradients, FeedbackState state,
               i64 sparse) {
    DECLARE_OPEN_RUN(run);
    __shared__ u32 any;
    const Row row(layout);
    const u32 bits = row.count ? mask[row.position / kRow] : 0;
    if (threadIdx.x == 0) any = 0;
    __syncthreads();
    if (bits) atomicOr(&any, 1u);
    __syncthreads();
    if (!any) return;
    run.chunk += i64(blockIdx.y) * format.chunk_bytes;
    run.open(layout, blockIdx.x / kRunBlocks, totals_, few_totals_);
    if (!bits) return;
    with_element_type(gradients.dtype, [&](auto* type) {
        roll_back(type, row, bits, gradients, state, sparse, [&](int j) {
            const float sent = run.at(32 * row_in_run() + u32(j));
            return sent == sent ? sent : 0.f;  // a shard that travels as NaN altogether sends nothing of its finite elements
        });
    });
}
