// Ways to go through the elements of a layout.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace {

// Bytes from which gradients would not stay in the caches until somebody reads them: they are written past them.
constexpr int64_t kLarge = int64_t(4) << 20;

constexpr int64_t kAhead = 1024;  // elements between what is worked on and what is being fetched, where the processor needs help

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// visit(tensor, first, count, position) for part `part` of `parts` of all blocks, in order: `count` elements of the
// tensor from its element `first`, which lie at `position` of the flat array. A block never holds two tensors.
template <class Visit>
void for_blocks(const Layout& layout, int64_t block, int part, int parts, const Visit& visit) {
    int64_t total = 0;
    for (int64_t i = 0; i < layout.tensors; i++) total += ceil_div(layout.numel[i], block);
    int64_t skip = total * part / parts, left = total * (part + 1) / parts - skip;
    for (int64_t i = 0; i < layout.tensors && left > 0; i++) {
        const int64_t blocks = ceil_div(layout.numel[i], block), from = std::min(skip, blocks);
        skip -= from;
        for (int64_t b = from; b < blocks && left > 0; b++, left--) {
            const int64_t first = b * block;
            visit(i, first, std::min(block, layout.numel[i] - first), layout.offset[i] + first);
        }
    }
}

// visit(tensor, first, count, position) for what lies in the elements begin .. end of the flat array.
template <class Visit>
void for_range(const Layout& layout, int64_t begin, int64_t end, const Visit& visit) {
    const int64_t* after = std::upper_bound(layout.offset, layout.offset + layout.tensors, begin);
    for (int64_t i = std::max<int64_t>(after - layout.offset - 1, 0); i < layout.tensors && layout.offset[i] < end; i++) {
        const int64_t from = std::max(begin, layout.offset[i]), to = std::min(end, layout.offset[i] + layout.numel[i]);
        if (from < to) visit(i, from - layout.offset[i], to - from, from);
    }
}

// call(type), where type is a null pointer of the tensors' element type
template <class Call>
void with_element_type(Dtype dtype, const Call& call) {
    switch (dtype) {
        case Dtype::float16: return call(static_cast<Half*>(nullptr));
        case Dtype::bfloat16: return call(static_cast<BFloat16*>(nullptr));
        default: return call(static_cast<float*>(nullptr));
    }
}

}  // namespace
