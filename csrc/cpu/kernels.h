// What the translation units of kernels offer to the binding, which checks the arguments: kernels trust them.
#pragma once

#include <cstdint>

enum class Dtype { none, float32, float16, bfloat16 };

// Where some tensors lie in a flat array of `shards` shards of `shard_numel` elements (ds_horovod/layout.py). Tensor i
// takes the elements offset[i] .. offset[i]+numel[i]. Offsets ascend and are block-aligned; everything else is padding.
struct Layout {
    int64_t tensors;
    const int64_t* offset;
    const int64_t* numel;
    int64_t shards, shard_numel;
};

// The tensors themselves. dtype none: there are no tensors, and the value to be sent is the error alone.
struct Tensors {
    Dtype dtype;
    void* const* data;
};

// What one side keeps of a bucket, and which random numbers it draws (ds_horovod/feedback.py). error and velocity may be
// null; a velocity requires gradients and an error.
struct FeedbackState {
    float* error;
    float* velocity;
    float momentum;
    uint32_t bucket, sender, first_shard, step;
};

// The passes of a family, which ds_horovod/kernels/backend.py explains. Each family defines NAME_encode and so on.
template <class Format>
struct Passes {
    void (*encode)(const Format&, const Layout&, Tensors gradients, FeedbackState, uint8_t* chunks, int threads);
    void (*decode)(const Format&, const Layout&, const uint8_t* chunks, Tensors gradients, int threads);
    void (*accumulate)(const Format&, const Layout&, const uint8_t* chunk, float weight, float* sum, int threads);
    bool (*is_within)(const Format&, const Layout&, const uint8_t* chunks, int64_t count, float limit);
    // Null where no kernel does all of the server pass at once.
    void (*serve)(const Format&, const Layout&, const uint8_t* pushed, int64_t workers, float weight, FeedbackState,
                  uint8_t* chunk, int threads);
    // Returns what is wrong with the positions in some chunks, or null: a corrupted payload must never be scattered. Null
    // where a chunk holds no positions.
    const char* (*fault)(const Format&, const Layout&, const uint8_t* chunks);
};

#include "families.h"

struct Kernels {
#define DS_MEMBER(name, Format) Passes<Format> name;
    DS_FAMILIES(DS_MEMBER)
#undef DS_MEMBER
    bool (*all_within)(const float* values, int64_t count, float limit);
    void (*uniforms_of_rows)(const uint32_t key[2], const uint32_t counter[3], uint64_t first_row, int64_t rows, float* out);
};

extern const Kernels avx2_kernels, portable_kernels;
