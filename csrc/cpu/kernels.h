// What the translation units of kernels offer to the binding. Arguments are checked by the binding, not here.
#pragma once

#include <cstdint>

enum class Dtype { none, float32, float16, bfloat16 };
enum class Granularity { block, parameter, bucket };

// Where some tensors lie in a flat array of `shards` shards of `shard_numel` elements (ds_horovod/layout.py). Tensor i
// takes the elements offset[i] .. offset[i]+numel[i]; offsets ascend and are block-aligned, what lies between is padding.
struct Layout {
    int64_t tensors;
    const int64_t* offset;
    const int64_t* numel;
    int64_t shards, shard_numel;
};

// The tensors themselves. dtype none: there are none, and the value to be sent is the error alone.
struct Tensors {
    Dtype dtype;
    void* const* data;
};

struct OneBit {
    int64_t block;
    bool l2;
    Granularity granularity;
    int64_t scales;       // in a chunk
    int64_t bits_at;      // byte of a chunk where the signs begin
    int64_t chunk_bytes;
};

enum class Values { fp32, fp16, sign };

struct TopK {
    int64_t k;            // entries in a chunk, at most
    Values values;
    int low_bits;         // of an offset that are written out, the upper ones being coded in unary
    int64_t scales_at, upper_at, low_at, values_at, chunk_bytes;
};

struct Quantize {
    int64_t block;
    int bits;             // of an element; 0: five elements of base 3 in a byte
    int64_t levels;       // on either side of zero
    bool stochastic, l2;
    int64_t codes_at;     // byte of a chunk where the codes begin, after a float32 for each block
    int64_t chunk_bytes;
    uint64_t seed;

    int64_t block_bytes() const { return bits == 0 ? (block + 4) / 5 : block * bits / 8; }
};

struct Cast {
    Dtype dtype;          // of what travels: float16 or bfloat16
    int64_t chunk_bytes;
};

struct RandomK {
    int64_t k;            // entries in a chunk
    bool half;            // values as float16
    uint64_t seed;
    int64_t chunk_bytes;
};

// At the beginning of a chunk: what its positions are drawn from.
struct RandomKHeader {
    uint32_t step, bucket, shard, k;
};

// What one side keeps of a bucket, and which random numbers it draws (ds_horovod/memory.py). error and velocity may be null;
// a velocity comes with gradients and an error.
struct Memory {
    float* error;
    float* velocity;
    float momentum;
    uint32_t bucket, sender, first_shard, step;

    Memory from(int64_t position) const {
        Memory part = *this;
        if (error) part.error += position;
        if (velocity) part.velocity += position;
        return part;
    }
};

// Random numbers: of a key (low and high half of a seed) and three words of a counter, before which random.inl counts rows.
struct Philox {
    uint32_t key[2], counter[3];
};

// The passes of a codec, which are explained in ds_horovod/kernels/reference.py.
template <class Codec>
struct Passes {
    void (*encode)(const Codec&, const Layout&, Tensors gradients, Memory, uint8_t* chunks, int threads);
    void (*decode)(const Codec&, const Layout&, const uint8_t* chunks, Tensors gradients, int threads);
    void (*accumulate)(const Codec&, const Layout&, const uint8_t* chunk, float weight, float* sum, int threads);
    // Where they are fused; else null.
    void (*serve)(const Codec&, const Layout&, const uint8_t* pushed, int64_t workers, float weight, Memory, uint8_t* chunk,
                  int threads);
};

struct Kernels {
    Passes<OneBit> one_bit;
    Passes<TopK> top_k;
    Passes<Quantize> quantize;
    Passes<Cast> cast;
    Passes<RandomK> random_k;
    bool (*cast_is_within)(const Cast&, const uint8_t* chunks, int64_t bytes, float limit);
    bool (*all_within)(const float* values, int64_t count, float limit);
    void (*uniforms_of_rows)(const Philox&, uint64_t first_row, int64_t rows, float* out);
};

extern const Kernels avx2_kernels, portable_kernels;

// Null, or what is wrong with the entries of these chunks: a truncated or corrupted payload must never be scattered.
const char* top_k_fault(const TopK&, const Layout&, const uint8_t* chunks);
const char* random_k_fault(const RandomK&, const Layout&, const uint8_t* chunks);
