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

// What one side keeps of a bucket (ds_horovod/memory.py), or null. A velocity comes with gradients and an error.
struct Memory {
    float* error;
    float* velocity;
    float momentum, decay;

    Memory from(int64_t position) const {
        return {error ? error + position : nullptr, velocity ? velocity + position : nullptr, momentum, decay};
    }
};

// Random numbers: of a key (low and high half of a seed) and three words of a counter, before which random.inl counts rows.
struct Philox {
    uint32_t key[2], counter[3];
};

struct Kernels {
    void (*one_bit_encode)(const OneBit&, const Layout&, Tensors gradients, Memory, uint8_t* chunks, int threads);
    void (*one_bit_serve)(const OneBit&, const Layout&, const uint8_t* pushed, int64_t workers, float weight,
                          float* error, uint8_t* chunk, int threads);
    void (*one_bit_decode)(const OneBit&, const Layout&, const uint8_t* chunks, Tensors gradients, int threads);
    void (*one_bit_accumulate)(const OneBit&, const Layout&, const uint8_t* chunk, float weight, float* sum, int threads);
    void (*top_k_encode)(const TopK&, const Layout&, Tensors gradients, Memory, uint8_t* chunks, int threads);
    void (*top_k_decode)(const TopK&, const Layout&, const uint8_t* chunks, Tensors gradients, int threads);
    void (*top_k_accumulate)(const TopK&, const Layout&, const uint8_t* chunk, float weight, float* sum, int threads);
    void (*quantize_encode)(const Quantize&, const Layout&, Tensors gradients, Memory, const Philox&, uint8_t* chunks, int threads);
    void (*quantize_serve)(const Quantize&, const Layout&, const uint8_t* pushed, int64_t workers, float weight, float* error,
                           const Philox&, uint8_t* chunk, int threads);
    void (*quantize_decode)(const Quantize&, const Layout&, const uint8_t* chunks, Tensors gradients, int threads);
    void (*quantize_accumulate)(const Quantize&, const Layout&, const uint8_t* chunk, float weight, float* sum, int threads);
    void (*cast_encode)(const Cast&, const Layout&, Tensors gradients, Memory, uint8_t* chunks, int threads);
    void (*cast_decode)(const Cast&, const Layout&, const uint8_t* chunks, Tensors gradients, int threads);
    void (*cast_accumulate)(const Cast&, const Layout&, const uint8_t* chunk, float weight, float* sum, int threads);
    bool (*cast_is_within)(const Cast&, const uint8_t* chunks, int64_t bytes, float limit);
    void (*random_k_encode)(const RandomK&, const Layout&, Tensors gradients, Memory, RandomKHeader first, uint8_t* chunks,
                            int threads);
    void (*random_k_decode)(const RandomK&, const Layout&, const uint8_t* chunks, Tensors gradients, int threads);
    void (*random_k_accumulate)(const RandomK&, const Layout&, const uint8_t* chunk, float weight, float* sum, int threads);
    bool (*all_within)(const float* values, int64_t count, float limit);
    void (*uniforms_of_rows)(const Philox&, uint64_t first_row, int64_t rows, float* out);
};

extern const Kernels avx2_kernels, portable_kernels;

// Null, or what is wrong with the entries of these chunks: a truncated or corrupted payload must never be scattered.
const char* top_k_fault(const TopK&, const Layout&, const uint8_t* chunks);
const char* random_k_fault(const RandomK&, const Layout&, const uint8_t* chunks);
