// The families of formats: the one list of them for the CPU.
//
// It is read twice. Everyone sees the formats and `DS_FAMILIES`; a translation unit of kernels then defines DS_TABLE as the
// name of its table and includes this file again, which compiles all kernels for the instruction set at hand.
#ifndef DS_FAMILIES
#define DS_FAMILIES(X) X(one_bit, OneBit) X(top_k, TopK) X(quantize, Quantize) X(cast, Cast) X(random_k, RandomK)

#include <algorithm>
#include <stdexcept>
#include <string>

inline void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}
inline bool is_aligned(const Layout& layout, int64_t block) {
    return layout.shard_numel % block == 0 &&
           std::all_of(layout.offset, layout.offset + layout.tensors, [=](int64_t o) { return o % block == 0; });
}

// A format mirrors its NamedTuple in ds_horovod/kernels/formats.py. `of` takes the fields of that tuple, and `check` refuses a
// layout whose chunks it could not hold.

enum class Granularity { block, parameter, bucket };

struct OneBit {
    int64_t block;
    bool l2;
    Granularity granularity;
    int64_t scales;       // in a chunk
    int64_t bits_at;      // byte of a chunk where the signs begin
    int64_t chunk_bytes;

    static OneBit of(int64_t block, const std::string& scale, const std::string& granularity, int64_t scales, int64_t bits_at,
                     int64_t chunk_bytes) {
        const auto g = granularity == "block"       ? Granularity::block
                       : granularity == "parameter" ? Granularity::parameter
                                                    : Granularity::bucket;
        return {block, scale == "l2", g, scales, bits_at, chunk_bytes};
    }
    void check(const Layout& layout) const {
        require(block > 0 && block % 32 == 0 && is_aligned(layout, block), "tensors must start on blocks");
        require(bits_at >= 4 * scales && chunk_bytes >= bits_at + layout.shard_numel / 8 &&
                    (granularity != Granularity::block || scales >= layout.shard_numel / block),
                "a chunk too small for its scales and signs");
    }
};

enum class Values { fp32, fp16, sign };

struct TopK {
    int64_t k;            // entries in a chunk, at most
    Values values;
    int low_bits;         // of an offset that are written out; the upper bits are coded in unary
    int64_t scales_at, upper_at, low_at, values_at, chunk_bytes;

    static TopK of(int64_t k, const std::string& values, int low_bits, int64_t scales_at, int64_t upper_at, int64_t low_at,
                   int64_t values_at, int64_t chunk_bytes) {
        const auto v = values == "fp32" ? Values::fp32 : values == "fp16" ? Values::fp16 : Values::sign;
        return {k, v, low_bits, scales_at, upper_at, low_at, values_at, chunk_bytes};
    }
    void check(const Layout& layout) const {
        const int64_t runs = (layout.shard_numel + 65535) / 65536;
        const bool sign = values == Values::sign;
        const int64_t rows = (layout.shard_numel + (int64_t(1) << low_bits) - 1) >> low_bits;
        require(k >= 0 && low_bits >= 0 && low_bits < 16 && scales_at >= 4 * runs &&
                    upper_at >= scales_at + (sign ? 2 * ((k + 63) / 64 + runs) : 0) &&
                    low_at >= upper_at + (rows + (low_bits ? k : 0) + 7 * runs) / 8 &&
                    values_at >= low_at + (k * (low_bits + sign) + 7 * runs) / 8 + 8 &&  // read ahead
                    chunk_bytes >= values_at + (sign ? 0 : values == Values::fp16 ? 2 : 4) * k,
                "a chunk too small for its counts, offsets and values");
    }
};

struct Quantize {
    int64_t block;
    int bits;             // of an element; 0: five elements of base 3 in a byte
    int64_t levels;       // on either side of zero
    bool stochastic, l2;
    int64_t codes_at;     // byte of a chunk where the codes begin, after a float32 for each block
    int64_t chunk_bytes;
    uint64_t seed;

    static Quantize of(int64_t block, int bits, int64_t levels, bool stochastic, bool l2, int64_t codes_at,
                       int64_t chunk_bytes, uint64_t seed) {
        return {block, bits, levels, stochastic, l2, codes_at, chunk_bytes, seed};
    }
    int64_t block_bytes() const { return bits == 0 ? (block + 4) / 5 : block * bits / 8; }
    void check(const Layout& layout) const {
        require(block > 0 && block % 32 == 0 && is_aligned(layout, block), "tensors must start on blocks");
        const int64_t blocks = layout.shard_numel / block;
        require(codes_at >= 4 * blocks && chunk_bytes >= codes_at + blocks * block_bytes(),
                "a chunk too small for its scales and codes");
    }
};

struct Cast {
    Dtype dtype;          // of the values in a chunk
    int64_t chunk_bytes;

    static Cast of(const std::string& dtype, int64_t chunk_bytes) {
        const auto d = dtype == "fp32" ? Dtype::float32 : dtype == "fp16" ? Dtype::float16 : Dtype::bfloat16;
        return {d, chunk_bytes};
    }
    void check(const Layout& layout) const {
        require(is_aligned(layout, 32), "tensors must start on blocks");
        require(chunk_bytes >= (dtype == Dtype::float32 ? 4 : 2) * layout.shard_numel, "a chunk too small for its values");
    }
};

struct RandomK {
    int64_t k;            // entries in a chunk
    bool half;            // values as float16
    uint64_t seed;
    int64_t chunk_bytes;

    // At the beginning of a chunk: what its positions are drawn from.
    struct Header {
        uint32_t step, bucket, shard, k;
    };

    static RandomK of(int64_t k, const std::string& values, uint64_t seed, int64_t chunk_bytes) {
        return {k, values == "fp16", seed, chunk_bytes};
    }
    void check(const Layout& layout) const {
        require(is_aligned(layout, 32), "tensors must start on blocks");
        require(k >= 1 && k <= layout.shard_numel, "k must be positive, and no more than a shard has elements");
        require(chunk_bytes >= int64_t(sizeof(Header)) + (half ? 2 : 4) * k, "a chunk too small for its values");
    }
};

// What only some formats can do.
template <class Format> bool takes_velocity(const Format&) { return true; }
inline bool takes_velocity(const OneBit&) { return false; }
template <class Format> bool fuses_serve(const Format&) { return true; }  // as far as there is a kernel for it
inline bool fuses_serve(const OneBit& format) { return format.granularity == Granularity::block; }

#endif
#ifdef DS_TABLE

#include "elements.inl"
#include "one_bit.inl"
#include "quantize.inl"
#include "random.inl"
#include "top_k.inl"

#define DS_PASSES(name, Format) \
    {name##_encode, name##_decode, name##_accumulate, name##_is_within, name##_serve, name##_fault},
const Kernels DS_TABLE = {DS_FAMILIES(DS_PASSES) all_within<float>, uniforms_of_rows};
#undef DS_PASSES

#endif
