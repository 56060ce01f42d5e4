// One bit an element: a scale for each region, and the signs. Included by each translation unit of kernels.

#include <cmath>
#include <vector>

#include "parallel.h"
#include "sums.h"
#include "walk.h"
#include "within.h"

namespace {

// Which scale of a chunk belongs to a block: the law that ds_horovod/compressors/one_bit.py states for the payload.
class Scales {
public:
    Scales(const OneBit& format, const Layout& layout) : format_(format), layout_(layout) {
        if (format.granularity != Granularity::parameter) return;
        first_.assign(size_t(layout.shards), layout.tensors);
        for (int64_t i = layout.tensors - 1; i >= 0; i--) {
            if (layout.numel[i] == 0) continue;
            const int64_t from = layout.offset[i] / layout.shard_numel;
            const int64_t to = (layout.offset[i] + layout.numel[i] - 1) / layout.shard_numel;
            for (int64_t s = from; s <= to; s++) first_[size_t(s)] = i;
        }
    }
    int64_t slot(int64_t tensor, int64_t shard, int64_t position) const {
        switch (format_.granularity) {
            case Granularity::block: return (position - shard * layout_.shard_numel) / format_.block;
            case Granularity::parameter: return tensor - first_[size_t(shard)];
            default: return 0;
        }
    }

private:
    const OneBit& format_;
    const Layout& layout_;
    std::vector<int64_t> first_;  // the first tensor with elements in each shard
};

inline float* scale_in(uint8_t* chunk, int64_t slot) { return reinterpret_cast<float*>(chunk) + slot; }
inline const float* scale_in(const uint8_t* chunk, int64_t slot) { return reinterpret_cast<const float*>(chunk) + slot; }

template <bool L2> inline F8 square_or_abs(F8 v) { return L2 ? mul(v, v) : abs(v); }

// Stages a block: its values into `staged`, zero-padded to whole rows of 32, their signs into `bits`, and returns the sum
// of |v|, or of v * v. load_row(i, v) fills in a row of 32 values, load_value(i) gives one of what is left over.
template <bool L2, class LoadRow, class LoadValue>
inline float stage_rows(int64_t count, float* staged, uint8_t* bits, const LoadRow& load_row, const LoadValue& load_value) {
    RowSum sum;
    auto take = [&](int64_t i, const F8* v) {
        for (int q = 0; q < 4; q++) {
            store(staged + i + 8 * q, v[q]);
            sum.group[q] = add(sum.group[q], square_or_abs<L2>(v[q]));
        }
        const uint32_t word = signs(v[0]) | signs(v[1]) << 8 | signs(v[2]) << 16 | signs(v[3]) << 24;
        std::memcpy(bits + i / 8, &word, 4);
    };
    int64_t i = 0;
    for (const int64_t whole = count / kRow * kRow; i < whole;) {
        for (const int64_t end = std::min(i + kGroup, whole); i < end; i += kRow) {
            F8 v[4];
            load_row(i, v);
            take(i, v);
        }
        if (i % kGroup == 0) sum.close_group();  // else what is left over belongs to the same group
    }
    if (i < count) {
        float tail[kRow] = {};
        for (int64_t j = i; j < count; j++) tail[j - i] = load_value(j);
        const F8 v[4] = {load(tail), load(tail + 8), load(tail + 16), load(tail + 24)};
        take(i, v);
    }
    return sum.finish();
}

// v = gradient + error of a block, or one of the two alone, where the other is missing (null).
template <bool L2, class G>
inline float stage(const G* g, const float* e, int64_t count, float* staged, uint8_t* bits) {
    if (g && e)
        return stage_rows<L2>(
            count, staged, bits,
            [&](int64_t i, F8* v) {
                for (int q = 0; q < 4; q++) v[q] = add(load(g + i + 8 * q), load(e + i + 8 * q));
            },
            [&](int64_t i) { return to_float(g[i]) + e[i]; });
    if (g)
        return stage_rows<L2>(
            count, staged, bits, [&](int64_t i, F8* v) { for (int q = 0; q < 4; q++) v[q] = load(g + i + 8 * q); },
            [&](int64_t i) { return to_float(g[i]); });
    return stage_rows<L2>(
        count, staged, bits, [&](int64_t i, F8* v) { for (int q = 0; q < 4; q++) v[q] = load(e + i + 8 * q); },
        [&](int64_t i) { return e[i]; });
}

template <class G>
inline float stage(bool l2, const G* g, const float* e, int64_t count, float* staged, uint8_t* bits) {
    return l2 ? stage<true>(g, e, count, staged, bits) : stage<false>(g, e, count, staged, bits);
}

inline float scale_of(float sum, int64_t count, bool l2) {
    const float mean = sum / float(count);
    return l2 ? std::sqrt(mean) : mean;
}

// error = v - scale * sign(v), or, where v is not finite, the error stays and the block travels as NaN.
inline void settle(float& scale, const float* staged, float* error, uint8_t* bits, int64_t count) {
    if (!(scale <= float_of(kMaxFinite))) {
        scale = float_of(kNaN);
        std::memset(bits, 0, size_t(ceil_div(count, kRow) * kRow / 8));
        return;
    }
    if (!error) return;
    const F8 s = splat(scale);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const F8 v0 = load(staged + i), v1 = load(staged + i + 8);
        store(error + i, sub(v0, with_sign_of(s, v0)));
        store(error + i + 8, sub(v1, with_sign_of(s, v1)));
    }
    for (; i < count; i++) error[i] = staged[i] - float_of(bits_of(scale) | (bits_of(staged[i]) & kSignBit));
}

template <class G>
void encode_blocks(const OneBit& format, const Layout& layout, const void* const* gradients, FeedbackState state,
                   uint8_t* chunks, int threads) {
    parallel(threads, [&](int t) {
        std::vector<float> staged(size_t(format.block));
        for_blocks(layout, format.block, t, threads, [&](int64_t i, int64_t first, int64_t count, int64_t position) {
            const int64_t shard = position / layout.shard_numel, inside = position - shard * layout.shard_numel;
            uint8_t *chunk = chunks + shard * format.chunk_bytes, *bits = chunk + format.bits_at + inside / 8;
            const G* g = gradients ? static_cast<const G*>(gradients[i]) + first : nullptr;
            float* e = state.error ? state.error + position : nullptr;
            float scale = scale_of(stage(format.l2, g, e, count, staged.data(), bits), count, format.l2);
            settle(scale, staged.data(), e, bits, count);
            *scale_in(chunk, inside / format.block) = scale;
        });
    });
}

// Scales of whole parameters or shards: one pass for the sums, one for signs and errors.
template <class G>
void encode_regions(const OneBit& format, const Layout& layout, const void* const* gradients, FeedbackState state,
                    uint8_t* chunks, int threads) {
    struct Block { int64_t shard, slot, count; double sum; };
    std::vector<Block> blocks;
    const Scales scales(format, layout);
    for_blocks(layout, format.block, 0, 1, [&](int64_t i, int64_t, int64_t count, int64_t position) {
        const int64_t shard = position / layout.shard_numel;
        blocks.push_back({shard, scales.slot(i, shard, position), count, 0.0});
    });
    const int64_t total = int64_t(blocks.size());
    auto start = [&](int t) { return total * t / threads; };  // as for_blocks divides them
    auto stage_block = [&](int64_t i, int64_t first, int64_t count, int64_t position, float* staged, uint8_t* bits) {
        return stage(format.l2, gradients ? static_cast<const G*>(gradients[i]) + first : nullptr,
                     state.error ? state.error + position : nullptr, count, staged, bits);
    };
    parallel(threads, [&](int t) {
        std::vector<float> staged(size_t(format.block));
        std::vector<uint8_t> bits(size_t(format.block / 8));
        int64_t b = start(t);
        for_blocks(layout, format.block, t, threads, [&](int64_t i, int64_t first, int64_t count, int64_t position) {
            blocks[size_t(b++)].sum = double(stage_block(i, first, count, position, staged.data(), bits.data()));
        });
    });
    const FlushDenormals flush;
    for (int64_t from = 0, to; from < total; from = to) {  // a region's blocks stand together
        double lanes[256] = {}, elements = 0;
        const Block& region = blocks[size_t(from)];
        for (to = from; to < total; to++) {
            if (blocks[size_t(to)].shard != region.shard || blocks[size_t(to)].slot != region.slot) break;
            lanes[(to - from) % 256] += blocks[size_t(to)].sum;
            elements += double(blocks[size_t(to)].count);
        }
        for (int half = 128; half; half /= 2)
            for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
        const double mean = lanes[0] / elements;
        *scale_in(chunks + region.shard * format.chunk_bytes, region.slot) = float(format.l2 ? std::sqrt(mean) : mean);
    }
    parallel(threads, [&](int t) {
        std::vector<float> staged(size_t(format.block));
        int64_t b = start(t);
        for_blocks(layout, format.block, t, threads, [&](int64_t i, int64_t first, int64_t count, int64_t position) {
            const Block& at = blocks[size_t(b++)];
            uint8_t* chunk = chunks + at.shard * format.chunk_bytes;
            uint8_t* bits = chunk + format.bits_at + (position - at.shard * layout.shard_numel) / 8;
            float scale = *scale_in(chunk, at.slot);
            stage_block(i, first, count, position, staged.data(), bits);
            settle(scale, staged.data(), state.error ? state.error + position : nullptr, bits, count);
        });
    });
    for (const Block& at : blocks) {  // every thread has read the scales: name the non-finite ones alike
        float* scale = scale_in(chunks + at.shard * format.chunk_bytes, at.slot);
        if (!(*scale <= float_of(kMaxFinite))) *scale = float_of(kNaN);
    }
}

void one_bit_encode(const OneBit& format, const Layout& layout, Tensors gradients, FeedbackState state, uint8_t* chunks,
                    int threads) {
    const void* const* data = gradients.dtype == Dtype::none ? nullptr : gradients.data;
    with_element_type(gradients.dtype, [&](auto* type) {
        using G = std::remove_pointer_t<decltype(type)>;
        if (format.granularity == Granularity::block) encode_blocks<G>(format, layout, data, state, chunks, threads);
        else encode_regions<G>(format, layout, data, state, chunks, threads);
    });
}

// accumulate for every worker, then encode: in one pass, for scales of blocks
template <bool L2>
void serve_blocks(const OneBit& format, const Layout& layout, const uint8_t* pushed, int64_t workers, float weight,
                  float* error, uint8_t* chunk, int threads) {
    parallel(threads, [&](int t) {
        std::vector<float> staged(size_t(format.block)), worker_scale(size_t(workers), 0.f);
        const float* scales = worker_scale.data();
        for_blocks(layout, format.block, t, threads, [&](int64_t, int64_t, int64_t count, int64_t position) {
            const int64_t slot = position / format.block;
            for (int64_t w = 0; w < workers; w++)
                worker_scale[size_t(w)] = *scale_in(pushed + w * format.chunk_bytes, slot) * weight;
            const uint8_t* from = pushed + format.bits_at + position / 8;
            float* e = error ? error + position : nullptr;
            uint8_t* bits = chunk + format.bits_at + position / 8;
            const int64_t stride = format.chunk_bytes;
            const float sum = stage_rows<L2>(
                count, staged.data(), bits,
                [=](int64_t i, F8* v) {
                    if (e) prefetch(e + i + kAhead), prefetch(e + i + kAhead + kRow / 2);
                    for (int q = 0; q < 4; q++) v[q] = e ? load(e + i + 8 * q) : splat(0);
                    const uint8_t* row = from + i / 8;
                    for (int64_t w = 0; w < workers; w++, row += stride) {
                        F8 x[4];
                        negate_where(row, splat(scales[w]), x);
                        for (int q = 0; q < 4; q++) v[q] = add(v[q], x[q]);
                    }
                },
                [=](int64_t i) {
                    float v = e ? e[i] : 0.f;
                    for (int64_t w = 0; w < workers; w++)
                        v += from[w * stride + i / 8] >> (i % 8) & 1 ? -scales[w] : scales[w];
                    return v;
                });
            float scale = scale_of(sum, count, L2);
            settle(scale, staged.data(), e, bits, count);
            *scale_in(chunk, slot) = scale;
        });
    });
}

void one_bit_serve(const OneBit& format, const Layout& layout, const uint8_t* pushed, int64_t workers, float weight,
                   FeedbackState state, uint8_t* chunk, int threads) {
    const auto serve = format.l2 ? serve_blocks<true> : serve_blocks<false>;
    serve(format, layout, pushed, workers, weight, state.error, chunk, threads);
}

// out(i, values, valid): the values of a block, eight at a time; the last eight may hold fewer than 8 valid ones.
template <class Out>
inline void expand(float scale, const uint8_t* bits, int64_t count, const Out& out) {
    const F8 s = splat(scale);
    F8 x[4];
    int64_t i = 0;
    for (; i + kRow <= count; i += kRow) {
        negate_where(bits + i / 8, s, x);
        for (int q = 0; q < 4; q++) out(i + 8 * q, x[q], 8);
    }
    if (i == count) return;
    negate_where(bits + i / 8, s, x);  // a block's signs are padded to whole rows
    for (int q = 0; i < count; i += 8, q++) out(i, x[q], int(std::min<int64_t>(8, count - i)));
}

template <class G>
void decode_blocks(const OneBit& format, const Layout& layout, const uint8_t* chunks, void* const* gradients, int threads) {
    const Scales scales(format, layout);
    const bool large = layout.shards * layout.shard_numel * int64_t(sizeof(G)) >= kLarge;
    parallel(threads, [&](int t) {
        for_blocks(layout, format.block, t, threads, [&](int64_t i, int64_t first, int64_t count, int64_t position) {
            const int64_t shard = position / layout.shard_numel, inside = position - shard * layout.shard_numel;
            const uint8_t* chunk = chunks + shard * format.chunk_bytes;
            const float scale = *scale_in(chunk, scales.slot(i, shard, position));
            G* to = static_cast<G*>(gradients[i]) + first;
            const uint8_t* bits = chunk + format.bits_at + inside / 8;
            if constexpr (std::is_same_v<G, float>) {
                if (large && reinterpret_cast<uintptr_t>(to) % 32 == 0)
                    return expand(scale, bits, count, [to](int64_t at, F8 values, int valid) {
                        if (valid == 8) stream(to + at, values);
                        else put(to + at, values, valid);
                    });
            }
            expand(scale, bits, count, [to](int64_t at, F8 values, int valid) { put(to + at, values, valid); });
        });
        stream_end();
    });
}

void one_bit_decode(const OneBit& format, const Layout& layout, const uint8_t* chunks, Tensors gradients, int threads) {
    with_element_type(gradients.dtype, [&](auto* type) {
        decode_blocks<std::remove_pointer_t<decltype(type)>>(format, layout, chunks, gradients.data, threads);
    });
}

void one_bit_accumulate(const OneBit& format, const Layout& layout, const uint8_t* chunk, float weight, float* sum,
                        int threads) {
    const Scales scales(format, layout);
    parallel(threads, [&](int t) {
        for_blocks(layout, format.block, t, threads, [&](int64_t i, int64_t, int64_t count, int64_t position) {
            float* to = sum + position;
            const float scale = *scale_in(chunk, scales.slot(i, 0, position)) * weight;
            expand(scale, chunk + format.bits_at + position / 8, count,
                   [to](int64_t at, F8 values, int valid) { add_to(to + at, values, valid); });
        });
    });
}

bool one_bit_is_within(const OneBit& format, const Layout&, const uint8_t* chunks, int64_t count, float limit) {
    return all_within<float>(chunks, count, format.chunk_bytes, 0, format.scales, limit);
}

constexpr decltype(Passes<OneBit>::fault) one_bit_fault = nullptr;

}  // namespace
