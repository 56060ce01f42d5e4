// Element by element. Four neighbours a thread, whose gradients and errors are one access each.

// ---- all of them, as 16-bit floats

struct Cast {
    i64 dtype;  // of what travels: kFloat16 or kBFloat16
    i64 chunk_bytes;
};

// Threads take four elements of the shard blockIdx.y each; returns whether this one has any.
struct Quad {
    i64 inside, position;  // in the shard, and in the flat array
    Place place;
    int count;

    __device__ explicit Quad(const Layout& layout) : place{0, 0, 0}, count(0) {
        inside = 4 * (i64(blockIdx.x) * kThreads + threadIdx.x);
        position = i64(blockIdx.y) * layout.shard_numel + inside;
        if (inside >= layout.shard_numel) return;
        place = place_at(layout, position);
        count = int(min(place.count, 4ll));
    }
};

__device__ inline float largest_of(const Half*) { return 65504.f; }
__device__ inline float largest_of(const BFloat16*) { return float_of(0x7f7f0000u); }

// call(type), where type is a null pointer of the type that values travel as
template <class Call> __device__ inline void with_cast_type(const Cast& codec, const Call& call) {
    if (codec.dtype == kFloat16) call(static_cast<Half*>(nullptr));
    else call(static_cast<BFloat16*>(nullptr));
}

// Where the values of a chunk begin.
template <class T> __device__ inline T* values_in(T* type, u8* chunks, i64 chunk_bytes, i64 chunk) {
    return reinterpret_cast<T*>(chunks + chunk * chunk_bytes);
}
template <class T> __device__ inline const T* values_in(T* type, const u8* chunks, i64 chunk_bytes, i64 chunk) {
    return reinterpret_cast<const T*>(chunks + chunk * chunk_bytes);
}

// Writes new values of some neighbours where they are to change, all at once where they all are.
__device__ inline void store_where(const bool change[4], float* p, int count, const float x[4]) {
    if (change[0] && change[1] && change[2] && change[3]) return store(p, count, x);
    for (int j = 0; j < 4; j++)
        if (j < count && change[j]) p[j] = x[j];
}

// Sends v, which is finite or travels as NaN; keeps what is left where it is.
template <class H>
__device__ inline void cast_values(const float v[4], const float velocity[4], int count, H* out, float* error, float* new_velocity) {
    float sent[4], rest[4];
    bool finite[4];
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

extern "C" __global__ void __launch_bounds__(kThreads)
cast_encode(Cast codec, Layout layout, Tensors gradients, Memory memory, u8* chunks) {
    const Quad at(layout);
    if (!at.count) return;
    with_element_type(gradients.dtype, [&](auto* gradient_type) {
        float v[4], velocity[4];
        terms_at(gradient_type, gradients, memory, at.place, at.position).values(0, at.count, v, velocity);
        with_cast_type(codec, [&](auto* type) {
            cast_values(v, velocity, at.count, values_in(type, chunks, codec.chunk_bytes, blockIdx.y) + at.inside,
                        memory.error ? memory.error + at.position : nullptr,
                        memory.velocity ? memory.velocity + at.position : nullptr);
        });
    });
}

extern "C" __global__ void __launch_bounds__(kThreads)
cast_decode(Cast codec, Layout layout, const u8* chunks, Tensors gradients) {
    const Quad at(layout);
    if (!at.count) return;
    float v[4];
    with_cast_type(codec, [&](auto* type) {
        load(values_in(type, chunks, codec.chunk_bytes, blockIdx.y) + at.inside, at.count, v);
    });
    with_element_type(gradients.dtype, [&](auto* type) { store(element(type, gradients, at.place), at.count, v); });
}

// v += weight * what each worker has sent, one after the other
__device__ inline void add_casts(const Cast& codec, const u8* pushed, i64 workers, float weight, const Quad& at, float v[4]) {
    with_cast_type(codec, [&](auto* type) {
        for (i64 w = 0; w < workers; w++) {
            float x[4];
            load(values_in(type, pushed, codec.chunk_bytes, w) + at.inside, at.count, x);
            for (int j = 0; j < 4; j++) v[j] = v[j] + x[j] * weight;
        }
    });
}

extern "C" __global__ void __launch_bounds__(kThreads)
cast_accumulate(Cast codec, Layout layout, const u8* pushed, i64 workers, float weight, float* total) {
    const Quad at(layout);
    if (!at.count) return;
    float v[4];
    load(total + at.position, at.count, v);
    add_casts(codec, pushed, workers, weight, at, v);
    store(total + at.position, at.count, v);
}

extern "C" __global__ void __launch_bounds__(kThreads)
cast_serve(Cast codec, Layout layout, const u8* pushed, i64 workers, float weight, float* error, u8* chunk) {
    const Quad at(layout);
    if (!at.count) return;
    float v[4] = {0.f, 0.f, 0.f, 0.f};
    if (error) load(error + at.position, at.count, v);
    add_casts(codec, pushed, workers, weight, at, v);
    with_cast_type(codec, [&](auto* type) {
        cast_values(v, v, at.count, values_in(type, chunk, codec.chunk_bytes, 0) + at.inside,
                    error ? error + at.position : nullptr, nullptr);
    });
}
