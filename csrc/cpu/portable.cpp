// The kernels in plain C++, and what does not depend on the instruction set.
#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <type_traits>

#include "one_bit.inl"
#include "top_k.inl"

const Kernels portable_kernels = {one_bit_encode, one_bit_serve,  one_bit_decode,   one_bit_accumulate,
                                  top_k_encode,   top_k_decode,   top_k_accumulate, all_within};

const char* top_k_fault(const TopK& codec, const Layout& layout, const uint8_t* chunks) {
    for (int64_t shard = 0; shard < layout.shards; shard++) {
        const uint8_t* chunk = chunks + shard * codec.chunk_bytes;
        const uint16_t* offsets = offsets_in(codec, chunk);
        if (layout.shard_numel && counts_in(chunk)[0] == kAllNotFinite && std::isnan(value_in(codec, chunk, 0))) continue;
        int64_t entry = 0, tensor = 0;
        for (int64_t run = 0; run * kRun < layout.shard_numel; run++) {
            const int64_t count = counts_in(chunk)[run], begin = run * kRun;
            if (count > codec.k - entry) return "counts exceed k";
            int64_t previous = -1;
            for (int64_t last = entry + count; entry < last; entry++) {
                const int64_t inside = begin + offsets[entry], position = shard * layout.shard_numel + inside;
                if (offsets[entry] <= previous) return "offsets do not ascend";
                if (inside >= layout.shard_numel) return "offset past the end of its shard";
                previous = offsets[entry];
                while (tensor < layout.tensors && position >= layout.offset[tensor] + layout.numel[tensor]) tensor++;
                if (tensor == layout.tensors || position < layout.offset[tensor]) return "offset into padding";
            }
        }
    }
    return nullptr;
}
