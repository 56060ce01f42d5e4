// Element-wise formats: all elements as floats of 16 or 32 bits (Cast), or a few of them at random positions that all ranks
// draw alike (RandomK). A thread handles four neighbours, with one access each for their gradients and errors.

// ---- Cast
//
// Bytes per element for values of b bytes, with an error: encode 12 + b, decode 4 + b, server of n workers 8 + (n + 1) b.

struct Cast {
    i64 dtype;  // of what travels
    i64 chunk_bytes;
};

// Where the values of a chunk begin.
template <class T> __device__ inline T* values_in(T* type, u8* chunks, i64 chunk_bytes, i64 chunk) {
    return reinterpret_cast<T*>(chunks + chunk * chunk_bytes);
}
template <class T> __device__ inline const T* values_in(T* type, const u8* chunks, i64 chunk_bytes, i64 chunk) {
    return reinterpret_cast<const T*>(chunks + chunk * chunk_bytes);
}

// Stores the new values of those neighbours that change, in one access if all do.
__device__ inline void store_where(const bool change[4], float* p, int count, const float x[4]) {
    if (change[0] && change[1] && change[2] && change[3]) return store(p, count, x);
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (j < count && change[j]) p[j] = x[j];
}

// Sends v, or NaN where v is not finite, and updates error and velocity where it is finite.
template <class H>
__device__ inline void cast_values(const float v[4], const float velocity[4], int count, H* out, float* error,
                                   float* new_velocity) {
    float sent[4], rest[4];
    bool finite[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        H rounded;
        finite[j] = is_finite(v[j]);
        from_float(finite[j] ? limited(v[j], largest_of(out)) : float_of(kNaN), &rounded);
        sent[j] = to_float(rounded);
        rest[j] = v[j] - sent[j];
    }
    store(out, count, sent);
    if (error) store_where(finite, error, count, rest);
    if (new_velocity) store_where(finite, new_velocity, count, velocity);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
cast_encode(Cast format, Layout layout, Tensors gradients, FeedbackState state, u8* chunks) {
    const Quad at(layout);
    if (!at.count) return;
    with_element_type(gradients.dtype, [&](auto* gradient_type) {
        float v[4], velocity[4];
        terms_at(gradient_type, gradients, state, at.place, at.position).values(0, at.count, v, velocity);
        with_element_type(format.dtype, [&](auto* type) {
            cast_values(v, velocity, at.count, values_in(type, chunks, format.chunk_bytes, blockIdx.y) + at.inside,
                        state.error ? state.error + at.position : nullptr,
                        state.velocity ? state.velocity + at.position : nullptr);
        });
    });
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
cast_decode(Cast format, Layout layout, const u8* chunks, Tensors gradients) {
    const Quad at(layout);
    if (!at.count) return;
    float v[4];
    with_element_type(format.dtype, [&](auto* type) {
        load(values_in(type, chunks, format.chunk_bytes, blockIdx.y) + at.inside, at.count, v);
    });
    with_element_type(gradients.dtype, [&](auto* type) { store(element(type, gradients, at.place), at.count, v); });
}

// v += weight * the values of each worker, one worker after the other
__device__ inline void add_casts(const Cast& format, const u8* pushed, i64 workers, float weight, const Quad& at, float v[4]) {
    with_element_type(format.dtype, [&](auto* type) {
        for (i64 w = 0; w < workers; w++) {
            float x[4];
            load(values_in(type, pushed, format.chunk_bytes, w) + at.inside, at.count, x);
#pragma unroll
            for (int j = 0; j < 4; j++) v[j] = v[j] + x[j] * weight;
        }
    });
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
cast_accumulate(Cast format, Layout layout, const u8* pushed, i64 workers, float weight, float* total) {
    const Quad at(layout);
    if (!at.count) return;
    float v[4];
    load(total + at.position, at.count, v);
    add_casts(format, pushed, workers, weight, at, v);
    store(total + at.position, at.count, v);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
cast_serve(Cast format, Layout layout, const u8* pushed, i64 workers, float weight, float* error, u8* chunk) {
    const Quad at(layout);
    if (!at.count) return;
    float v[4] = {0.f, 0.f, 0.f, 0.f};
    if (error) load(error + at.position, at.count, v);
    add_casts(format, pushed, workers, weight, at, v);
    with_element_type(format.dtype, [&](auto* type) {
        cast_values(v, v, at.count, values_in(type, chunk, format.chunk_bytes, 0) + at.inside,
                    error ? error + at.position : nullptr, nullptr);
    });
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
cast_nonfinite_mask(Cast format, Layout layout, const u8* chunks, u32* mask) {
    const Row row(layout);
    if (row.inside >= layout.shard_numel) return;
    u32 bits = 0;
    with_element_type(format.dtype, [&](auto* type) {
        const auto* values = values_in(type, chunks, format.chunk_bytes, blockIdx.y) + row.inside;
        for (int j = 0; j < kRow; j += 4) {
            float x[4];
            load(values + j, 4, x);
#pragma unroll
            for (int i = 0; i < 4; i++) bits |= u32(!is_finite(x[i])) << (j + i);
        }
    });
    mask[row.position / kRow] = bits;
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
cast_rollback(Cast format, Layout layout, const u8* chunks, const u32* mask, Tensors gradients, FeedbackState state,
              i64 sparse) {
    const Row row(layout);
    if (!row.count || !mask[row.position / kRow]) return;
    with_element_type(gradients.dtype, [&](auto* gradient_type) {
        roll_back(gradient_type, row, mask[row.position / kRow], gradients, state, sparse, [&](int j) {
            float own = 0.f;
            with_element_type(format.dtype, [&](auto* type) {
                own = to_float(values_in(type, chunks, format.chunk_bytes, blockIdx.y)[row.inside + j]);
            });
            return own;
        });
    });
}

// ---- RandomK
//
// A shard is divided into k equal strata, with one position drawn in each. A thread handles four strata, which share the words
// of one counter. Bytes per element, with an error: encode 12.25 (a bit, stored in a byte, marks what is not finite), decode 4.
// The server accesses only the elements drawn.

constexpr u32 kDrawing = 0x72616e64u;  // distinguishes the key from that of stochastic rounding with the same seed
constexpr u32 kAllNotFinite = 0xffffffffu;

struct RandomK {
    i64 k, half;  // entries in a chunk; values as float16
    i64 chunk_bytes;
    u32 key[2];
};

// At the beginning of a chunk: what its positions are drawn from.
struct Header {
    u32 step, bucket, shard, k;
};

__device__ inline const Header& header_in(const RandomK& format, const u8* chunks, i64 chunk) {
    return *reinterpret_cast<const Header*>(chunks + chunk * format.chunk_bytes);
}
// A shard that is not finite, or a chunk that no encoder writes, is decoded to NaN.
__device__ inline bool is_sound(const RandomK& format, const Header& header) { return header.k == u32(format.k); }

__device__ inline i64 stratum_at(const RandomK& format, const Layout& layout, i64 stratum) {
    return i64(u64(stratum) * u64(layout.shard_numel) / u64(format.k));
}

struct Draws {
    u32 words[4];

    __device__ Draws(const RandomK& format, const Header& header, i64 row) {
        const Philox random{{format.key[0], format.key[1] ^ kDrawing}, {header.step, header.bucket, header.shard}};
        random_words<OneWord>(random, u32(row), words);
    }
    // The position in the shard that is drawn in a stratum of the row, `word` being its number there.
    __device__ i64 position(const RandomK& format, const Layout& layout, i64 stratum, u32 word) const {
        const i64 begin = stratum_at(format, layout, stratum), length = stratum_at(format, layout, stratum + 1) - begin;
        return begin + i64(u64(word) * u64(length) >> 32);
    }
};

// Calls call(stratum, position in the shard, place) for what this thread draws in the shard blockIdx.y, padding left out.
template <class Call>
__device__ inline void for_drawn(const RandomK& format, const Layout& layout, const Header& header, const Call& call) {
    const i64 row = i64(blockIdx.x) * kThreads + threadIdx.x;
    if (4 * row >= format.k) return;
    const Draws draws(format, header, row);
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const i64 stratum = 4 * row + w;
        if (stratum >= format.k) return;
        const i64 inside = draws.position(format, layout, stratum, draws.words[w]);
        const Place place = place_at(layout, i64(blockIdx.y) * layout.shard_numel + inside);
        if (place.count) call(stratum, inside, place);
    }
}

__device__ inline float sent_value(const RandomK& format, const u8* chunks, i64 chunk, i64 stratum) {
    const u8* values = chunks + chunk * format.chunk_bytes + sizeof(Header);
    if (format.half) return to_float(reinterpret_cast<const Half*>(values)[stratum]);
    return reinterpret_cast<const float*>(values)[stratum];
}
// Returns the value that readers will see.
__device__ inline float send_value(const RandomK& format, u8* chunks, i64 chunk, i64 stratum, float v) {
    u8* values = chunks + chunk * format.chunk_bytes + sizeof(Header);
    if (!format.half) return reinterpret_cast<float*>(values)[stratum] = v;
    Half* half = reinterpret_cast<Half*>(values) + stratum;
    from_float(v, half);
    return to_float(*half);
}
// Writes the header of a chunk. One thread for each shard calls it, once it is known whether the shard is finite.
__device__ inline void send_header(const RandomK& format, Header header, u8* chunks, i64 chunk) {
    Header* out = reinterpret_cast<Header*>(chunks + chunk * format.chunk_bytes);
    const bool finite = out->k != kAllNotFinite;
    out->step = header.step;
    out->bucket = header.bucket;
    out->shard = header.shard;
    if (finite) out->k = header.k;
    else send_value(format, chunks, chunk, 0, float_of(kNaN));
}

// Stores v in place of the error where it is finite, and marks a shard that is not finite by its k. A server's total and error
// stay as they are.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
random_k_collect(RandomK format, Layout layout, Tensors gradients, FeedbackState state, u8* nonfinite, u8* chunks) {
    const Quad at(layout);
    if (!at.count) return;
    with_element_type(gradients.dtype, [&](auto* type) {
        const auto terms = terms_at(type, gradients, state, at.place, at.position);
        float v[4], velocity[4];
        bool finite[4];
        u32 not_finite = 0;
        terms.values(0, at.count, v, velocity);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            finite[j] = is_finite(v[j]);
            if (j < at.count && !finite[j]) not_finite |= 1u << j;
        }
        if (nonfinite) nonfinite[at.position / 4] = u8(not_finite);
        if (not_finite) reinterpret_cast<Header*>(chunks + blockIdx.y * format.chunk_bytes)->k = kAllNotFinite;
        if (!terms.g) return;
        if (state.error) store_where(finite, state.error + at.position, at.count, v);
        if (state.velocity) store_where(finite, state.velocity + at.position, at.count, velocity);
    });
}

// Completes the dense pass. In a finite shard, a server's total is copied over its error. In any other shard, a worker rolls
// the pass back, up to rounding, except for the elements that it has not changed.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
random_k_finish(RandomK format, Layout layout, Tensors gradients, FeedbackState state, const u8* nonfinite, const u8* chunks) {
    const bool finite = header_in(format, chunks, blockIdx.y).k != kAllNotFinite;
    if (!state.error || finite != (state.total != nullptr)) return;
    const Quad at(layout);
    if (!at.count) return;
    float* e = state.error + at.position;
    if (finite) {
        float v[4];
        load(state.total + at.position, at.count, v);
        return store(e, at.count, v);
    }
    if (gradients.dtype == kNone) return;
    with_element_type(gradients.dtype, [&](auto* type) {
        const auto* g = element(type, gradients, at.place);
        float* u = state.velocity ? state.velocity + at.position : nullptr;
        for (int j = 0; j < at.count; j++) {
            if (nonfinite[at.position / 4] >> j & 1) continue;
            const float own = to_float(g[j]);
            e[j] = limited(e[j] - (u ? u[j] : own), float_of(kMaxFinite));
            if (u) u[j] = limited((u[j] - own) / state.momentum, float_of(kMaxFinite));
        }
    });
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
random_k_send(RandomK format, Layout layout, Header first, Tensors gradients, FeedbackState state, u8* chunks) {
    Header header = first;
    header.shard += blockIdx.y;
    const bool finite = header_in(format, chunks, blockIdx.y).k != kAllNotFinite;
    if (finite)
        with_element_type(gradients.dtype, [&](auto* type) {
            for_drawn(format, layout, header, [&](i64 stratum, i64 inside, const Place& place) {
                const i64 position = i64(blockIdx.y) * layout.shard_numel + inside;
                const float v = state.error ? state.error[position]
                                : state.total ? state.total[position] : to_float(*element(type, gradients, place));
                const float arrives = send_value(format, chunks, blockIdx.y, stratum, v);
                if (state.error) state.error[position] = v - arrives;
                if (state.velocity) state.velocity[position] = 0.f;
            });
        });
    if (blockIdx.x == 0 && threadIdx.x == 0) send_header(format, header, chunks, blockIdx.y);
}

// v = error + weight * the values of each worker, one worker after the other, at a position drawn.
__device__ inline float drawn_sum(const RandomK& format, const u8* pushed, i64 workers, float weight, float v, i64 stratum) {
    for (i64 w = 0; w < workers; w++) v = v + sent_value(format, pushed, w, stratum) * weight;
    return v;
}

// Whether the sum is finite. A worker that has drawn other positions than the server makes it not finite.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
random_k_serve_check(RandomK format, Layout layout, Header header, const u8* pushed, i64 workers, float weight,
                     const float* error, u8* chunk) {
    bool finite = true;
    for (i64 w = 0; w < workers; w++) {
        const Header& own = header_in(format, pushed, w);
        const bool alike = own.step == header.step && own.bucket == header.bucket && own.shard == header.shard;
        finite = finite && alike && is_sound(format, own);
    }
    for_drawn(format, layout, header, [&](i64 stratum, i64 inside, const Place&) {
        finite = finite && is_finite(drawn_sum(format, pushed, workers, weight, error ? error[inside] : 0.f, stratum));
    });
    if (!finite) reinterpret_cast<Header*>(chunk)->k = kAllNotFinite;
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
random_k_serve(RandomK format, Layout layout, Header header, const u8* pushed, i64 workers, float weight, float* error,
               u8* chunk) {
    if (header_in(format, chunk, 0).k != kAllNotFinite)
        for_drawn(format, layout, header, [&](i64 stratum, i64 inside, const Place&) {
            const float v = drawn_sum(format, pushed, workers, weight, error ? error[inside] : 0.f, stratum);
            const float arrives = send_value(format, chunk, 0, stratum, v);
            if (error) error[inside] = v - arrives;
        });
    if (blockIdx.x == 0 && threadIdx.x == 0) send_header(format, header, chunk, 0);
}

// Decoding first fills a shard with zeros, or with NaN if it is not finite, and then scatters the elements drawn.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
random_k_fill(RandomK format, Layout layout, const u8* chunks, Tensors gradients) {
    const Quad at(layout);
    if (!at.count) return;
    const float x = is_sound(format, header_in(format, chunks, blockIdx.y)) ? 0.f : float_of(kNaN), v[4] = {x, x, x, x};
    with_element_type(gradients.dtype, [&](auto* type) { store(element(type, gradients, at.place), at.count, v); });
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
random_k_scatter(RandomK format, Layout layout, const u8* chunks, Tensors gradients) {
    const Header header = header_in(format, chunks, blockIdx.y);
    if (!is_sound(format, header)) return;
    with_element_type(gradients.dtype, [&](auto* type) {
        for_drawn(format, layout, header, [&](i64 stratum, i64, const Place& place) {
            from_float(sent_value(format, chunks, blockIdx.y, stratum), element(type, gradients, place));
        });
    });
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
random_k_accumulate(RandomK format, Layout layout, const u8* pushed, i64 workers, float weight, float* total) {
    const i64 row = i64(blockIdx.x) * kThreads + threadIdx.x;
    if (4 * row >= format.k) return;
    for (i64 w = 0; w < workers; w++) {
        const Header header = header_in(format, pushed, w);
        if (is_sound(format, header)) {
            for_drawn(format, layout, header, [&](i64 stratum, i64 inside, const Place&) {
                total[inside] = total[inside] + sent_value(format, pushed, w, stratum) * weight;
            });
            continue;
        }
        const i64 end = stratum_at(format, layout, min(4 * row + 4, format.k));  // the strata of all threads are the shard
        for (i64 inside = stratum_at(format, layout, 4 * row); inside < end; inside++)
            if (place_at(layout, inside).count) total[inside] = float_of(kNaN);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
random_k_nonfinite_mask(RandomK format, Layout layout, const u8* chunks, u32* mask) {
    const Row row(layout);
    if (row.inside >= layout.shard_numel) return;
    mask[row.position / kRow] = is_sound(format, header_in(format, chunks, blockIdx.y)) ? 0 : kAllLanes;
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
random_k_rollback(RandomK format, Layout layout, const u8* chunks, const u32* mask, Tensors gradients, FeedbackState state,
                   i64 sparse) {
    const Row row(layout);
    const Header header = header_in(format, chunks, blockIdx.y);
    if (!row.count || !mask[row.position / kRow]) return;
    with_element_type(gradients.dtype, [&](auto* type) {
        roll_back(type, row, mask[row.position / kRow], gradients, state, sparse, [&](int j) {
            if (!is_sound(format, header)) return float_of(kNaN);
            const i64 inside = row.inside + j;
            const i64 stratum = i64((u64(inside + 1) * u64(format.k) - 1) / u64(layout.shard_numel));  // in which it lies
            const Draws draws(format, header, stratum / 4);
            // Selected among registers: indexing would move the words to memory.
            const u32* words = draws.words;
            const u32 word = stratum & 2 ? (stratum & 1 ? words[3] : words[2]) : stratum & 1 ? words[1] : words[0];
            if (draws.position(format, layout, stratum, word) != inside) return 0.f;
            return sent_value(format, chunks, blockIdx.y, stratum);
        });
    });
}
