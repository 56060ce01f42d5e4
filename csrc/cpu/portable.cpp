// The kernels in plain C++, and what does not depend on the instruction set.
#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <type_traits>

#include "elements.inl"
#include "one_bit.inl"
#include "quantize.inl"
#include "random.inl"
#include "top_k.inl"

const Kernels portable_kernels = {
    {one_bit_encode, one_bit_decode, one_bit_accumulate, one_bit_serve},
    {top_k_encode, top_k_decode, top_k_accumulate, nullptr},
    {quantize_encode, quantize_decode, quantize_accumulate, quantize_serve},
    {cast_encode, cast_decode, cast_accumulate, nullptr},
    {random_k_encode, random_k_decode, random_k_accumulate, nullptr},
    cast_is_within, all_within, uniforms_of_rows,
};

const char* top_k_fault(const TopK& codec, const Layout& layout, const uint8_t* chunks) {
    for (int64_t shard = 0; shard < layout.shards; shard++) {
        const uint8_t* chunk = chunks + shard * codec.chunk_bytes;
        if (layout.shard_numel && counts_in(chunk)[0] == kAllNotFinite) {
            const uint8_t* first = chunk + (codec.values == Values::sign ? codec.scales_at : codec.values_at);
            const float value = codec.values == Values::fp32   ? *reinterpret_cast<const float*>(first)
                                : codec.values == Values::fp16 ? to_float(*reinterpret_cast<const Half*>(first))
                                                               : to_float(*reinterpret_cast<const BFloat16*>(first));
            if (std::isnan(value)) continue;
        }
        Place at;
        int64_t tensor = 0;
        for (int64_t run = 0; run * kRun < layout.shard_numel; run++) {
            const int64_t count = counts_in(chunk)[run], begin = run * kRun, numel = run_numel(layout, run);
            if (count > codec.k - at.entries) return "counts exceed k";
            const char* fault = nullptr;
            int64_t previous = -1;
            const int64_t found = read_offsets(codec, chunk, at, numel, count, [&](int64_t, int64_t offset, uint32_t) {
                const int64_t position = shard * layout.shard_numel + begin + offset;
                if (offset <= previous) fault = "offsets do not ascend";
                else if (offset >= numel) fault = "offset past the end of its shard";
                if (fault) return;
                previous = offset;
                while (tensor < layout.tensors && position >= layout.offset[tensor] + layout.numel[tensor]) tensor++;
                if (tensor == layout.tensors || position < layout.offset[tensor]) fault = "offset into padding";
            });
            if (found != count) return "not as many entries as a count says";
            if (fault) return fault;
            advance(codec, numel, count, at);
        }
    }
    return nullptr;
}

const char* random_k_fault(const RandomK& codec, const Layout& layout, const uint8_t* chunks) {
    for (int64_t shard = 0; shard < layout.shards; shard++) {
        const uint8_t* chunk = chunks + shard * codec.chunk_bytes;
        const uint32_t k = header_of(chunk).k;
        const bool all_not_finite = k == kAllNotFinite && std::isnan(sent_value(codec, chunk, 0));
        if (k != codec.k && !all_not_finite) return "another k than the layout's";
    }
    return nullptr;
}
