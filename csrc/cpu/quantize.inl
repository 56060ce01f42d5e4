// Each element becomes one of a few levels, evenly spaced up to the scale of its block. Included by each translation unit of
// kernels.
//
// code = trunc(|v| * levels / scale + r), where r is 0.5, which rounds to the nearest level, or random in [0, 1), which makes
// the result unbiased. Readers decode code * (scale / levels), with the sign of v.

#include <cmath>
#include <vector>

#include "parallel.h"
#include "random.inl"
#include "sums.h"
#include "walk.h"
#include "within.h"

namespace {

constexpr int64_t kDigits = 5;  // of base 3 in a byte

// The codes of neighbours, which are packed alike: of as many as surely lie in a part of a block.
using Codes4 = uint32_t;
using Codes16 = uint8_t __attribute__((vector_size(16)));
template <class Codes> inline Codes codes_at(const uint8_t* p) { Codes c; std::memcpy(&c, p, sizeof(Codes)); return c; }
template <class Codes> inline void put_codes(uint8_t* p, Codes c) { std::memcpy(p, &c, sizeof(Codes)); }
constexpr Codes4 each(uint8_t bits) { return 0x01010101u * bits; }

// The elements of a byte lie far apart, so that adjacent bytes hold adjacent elements, and compilers can vectorize the loops.
inline void pack_codes(const Quantize& format, const uint8_t* __restrict c, uint8_t* __restrict out) {
    switch (format.bits) {
        case 0: {
            const int64_t m = ceil_div(format.block, kDigits);
            for (int64_t j = 0; j < m; j++)
                out[j] = uint8_t(c[j] + 3 * (c[m + j] + 3 * (c[2 * m + j] + 3 * (c[3 * m + j] + 3 * c[4 * m + j]))));
            break;
        }
        case 2: {
            const int64_t m = format.block / 4;
            for (int64_t j = 0; j < m; j += 4) {
                auto at = [&](int64_t i) { return codes_at<Codes4>(c + i * m + j); };
                put_codes(out + j, at(0) | at(1) << 2 | at(2) << 4 | at(3) << 6);
            }
            break;
        }
        case 3: {
            const int64_t m = format.block / 8;
            for (int64_t j = 0; j < m; j += 4) {
                auto at = [&](int64_t i) { return codes_at<Codes4>(c + i * m + j); };
                put_codes(out + j, at(0) | at(1) << 3 | (at(2) & each(3)) << 6);
                put_codes(out + m + j, (at(2) >> 2 & each(1)) | at(3) << 1 | at(4) << 4 | (at(5) & each(1)) << 7);
                put_codes(out + 2 * m + j, (at(5) >> 1 & each(3)) | at(6) << 2 | at(7) << 5);
            }
            break;
        }
        case 4: {
            const int64_t m = format.block / 2;
            for (int64_t j = 0; j < m; j += 16)
                put_codes(out + j, codes_at<Codes16>(c + j) | codes_at<Codes16>(c + m + j) << 4);
            break;
        }
        default: std::memcpy(out, c, size_t(format.block));
    }
}

// Returns where the codes are, a byte each: there is `room` for them, and for 2 * kDigits more.
inline const uint8_t* unpack_codes(const Quantize& format, const uint8_t* __restrict in, uint8_t* __restrict room) {
    uint8_t* __restrict c = room;
    switch (format.bits) {
        case 0: {
            const int64_t m = ceil_div(format.block, kDigits);
            for (int64_t i = 0; i < kDigits; i++)  // digit by digit, which compilers vectorize
                for (int64_t j = 0; j < m; j++) {
                    const auto x = uint16_t(i ? c[(kDigits - 1) * m + j] : in[j]), third = uint16_t(x * 171 >> 9);
                    c[i * m + j] = uint8_t(i < kDigits - 1 ? x - 3 * third : x % 3);
                    if (i < kDigits - 1) c[(kDigits - 1) * m + j] = uint8_t(third);
                }
            break;
        }
        case 2: {
            const int64_t m = format.block / 4;
            for (int64_t i = 0; i < 4; i++)
                for (int64_t j = 0; j < m; j += 4) put_codes(c + i * m + j, codes_at<Codes4>(in + j) >> (2 * i) & each(3));
            break;
        }
        case 3: {
            const int64_t m = format.block / 8;
            for (int64_t j = 0; j < m; j += 4) {
                const auto x = codes_at<Codes4>(in + j), y = codes_at<Codes4>(in + m + j), z = codes_at<Codes4>(in + 2 * m + j);
                put_codes(c + j, x & each(7));
                put_codes(c + m + j, x >> 3 & each(7));
                put_codes(c + 2 * m + j, (x >> 6 & each(3)) | (y & each(1)) << 2);
                put_codes(c + 3 * m + j, y >> 1 & each(7));
                put_codes(c + 4 * m + j, y >> 4 & each(7));
                put_codes(c + 5 * m + j, (y >> 7 & each(1)) | (z & each(3)) << 1);
                put_codes(c + 6 * m + j, z >> 2 & each(7));
                put_codes(c + 7 * m + j, z >> 5 & each(7));
            }
            break;
        }
        case 4: {
            const int64_t m = format.block / 2;
            for (int64_t j = 0; j < m; j += 16) {
                const auto x = codes_at<Codes16>(in + j);
                put_codes(c + j, x & 15);
                put_codes(c + m + j, x >> 4);
            }
            break;
        }
        default: return in;
    }
    return room;
}

// One block in the first-level cache, zero past its last element.
struct QuantizedBlock {
    explicit QuantizedBlock(const Quantize& format)
        : format(format), values(size_t(format.block)), velocities(size_t(format.block)),
          codes(size_t(format.block + 2 * kDigits)) {}

    const Quantize& format;
    std::vector<float> values, velocities;
    std::vector<uint8_t> codes;

    // Stages the values, and returns their scale. load_row(i, v) fills in a row of 32, load_value(i) gives one of what is left
    // over.
    template <class LoadRow, class LoadValue>
    float stage_rows(int64_t count, const LoadRow& load_row, const LoadValue& load_value) {
        return format.l2 ? stage_rows<true>(count, load_row, load_value) : stage_rows<false>(count, load_row, load_value);
    }

    // v = gradient + error, with momentum * velocity; or the error alone.
    template <class G> float stage(const G* g, const FeedbackState& kept, int64_t count) {
        const float *e = kept.error, *u = kept.velocity, momentum = kept.momentum;
        float* w = velocities.data();
        return stage_rows(
            count,
            [=](int64_t i, F8* v) {
                for (int q = 0; q < 4; q++) v[q] = g ? load(g + i + 8 * q) : load(e + i + 8 * q);
                if (u)
                    for (int q = 0; q < 4; q++)
                        store(w + i + 8 * q, v[q] = add(mul(splat(momentum), load(u + i + 8 * q)), v[q]));
                if (g && e)
                    for (int q = 0; q < 4; q++) v[q] = add(v[q], load(e + i + 8 * q));
            },
            [=](int64_t i) {
                float v = g ? to_float(g[i]) : e[i];
                if (u) w[i] = v = momentum * u[i] + v;
                return g && e ? v + e[i] : v;
            });
    }

    // Writes the payload of the block, and error and velocity, if any. `position` selects the random numbers. fetch(i) is
    // called for each row of 32, to bring what later blocks need while this one is being rounded.
    template <class Fetch>
    void finish(float scale, int64_t count, int64_t position, const Philox& random, const FeedbackState& kept, float* step,
                uint8_t* out, const Fetch& fetch) {
        const float levels = float(format.levels);
        if (!(scale <= float_of(kMaxFinite))) {
            *step = float_of(kNaN);
            return;
        }
        *step = std::min(scale / levels, widest_step(levels));  // what readers make of the outermost level must be finite
        const float shrink = shrink_of(scale), inverse = std::min(levels / (scale * shrink), float_of(kMaxFinite));
        const F8 by = splat(inverse), smaller = splat(shrink), width = splat(*step), most = splat(levels);
        const bool whole = count == format.block, stochastic = format.stochastic;
        const float *v = values.data(), *u = kept.velocity ? velocities.data() : nullptr;
        float *error = whole && kept.error ? kept.error : values.data();
        float *velocity = whole && kept.velocity ? kept.velocity : velocities.data();
        uint8_t* to = codes.data();
        F8 r[8];
        for (F8& half : r) half = splat(0.5f);
        for (int64_t i = 0, end = format.block; i < end; i += kRow) {
            fetch(i);
            if (stochastic && i % 64 == 0) uniforms(random, uint64_t(position + i) / 8, r);
            F8 signed_level[4];
            for (int q = 0; q < 4; q++) {
                const int64_t at = i + 8 * q;
                const F8 x = load(v + at);
                const F8 level = truncated(add(mul(mul(abs(x), smaller), by), r[at / 8 % 8]), most);
                signed_level[q] = with_sign_of(level, x);
                store(error + at, sub(x, mul(signed_level[q], width)));
                if (u) store(velocity + at, where_zero(load(u + at), level));
            }
            to_codes(signed_level, most, to + i);
        }
        if (!whole && kept.error) std::copy(error, error + count, kept.error);
        if (!whole && kept.velocity) std::copy(velocity, velocity + count, kept.velocity);
        pack_codes(format, codes.data(), out);
    }

private:
    template <bool L2, class LoadRow, class LoadValue>
    float stage_rows(int64_t count, const LoadRow& load_row, const LoadValue& load_value) {
        RowSum sum;
        F8 largest[4] = {splat(0), splat(0), splat(0), splat(0)}, v[4];
        float* to = values.data();
        auto take = [&](int64_t i) {
            for (int q = 0; q < 4; q++) {
                store(to + i + 8 * q, v[q]);
                if (L2) sum.group[q] = add(sum.group[q], mul(v[q], v[q]));
                else largest[q] = larger_magnitude(largest[q], v[q]);
            }
            if (L2 && (i + kRow) % kGroup == 0) sum.close_group();
        };
        int64_t i = 0;
        for (; i + kRow <= count; i += kRow) {
            load_row(i, v);
            take(i);
        }
        if (i < count) {
            float tail[kRow] = {};
            for (int64_t j = i; j < count; j++) tail[j - i] = load_value(j);
            for (int q = 0; q < 4; q++) v[q] = load(tail + 8 * q);
            take(i);
            i += kRow;
        }
        std::fill(to + i, to + format.block, 0.f);
        if (L2) return std::sqrt(sum.finish());
        for (int q = 1; q < 4; q++) largest[0] = larger_magnitude(largest[0], largest[q]);
        float lanes[8];
        store(lanes, largest[0]);
        uint32_t most = 0;
        for (float lane : lanes) most = std::max(most, magnitude(lane));
        return float_of(most);
    }
};

// Whether no row of 32 lies in both halves of a block of 4-bit codes: then they are read as they are packed.
inline bool in_halves(const Quantize& format) { return format.bits == 4 && format.block % 64 == 0; }

// out(i, values, valid): the values of a block, eight at a time; the last eight may hold fewer than 8 valid ones. There is
// room for unpacked codes.
template <class Out>
inline void expand(const Quantize& format, const uint8_t* codes, float step, int64_t count, uint8_t* room, const Out& out) {
    const F8 s = splat(step), levels = splat(float(format.levels));
    auto from = [&](const uint8_t* byte, int64_t begin, int64_t end, const auto& read) {
        int64_t i = begin;
        for (; i + 8 <= end; i += 8) out(i, mul(read(byte + i - begin, levels), s), 8);
        if (i < end) out(i, mul(read(byte + i - begin, levels), s), int(end - i));
    };
    const int64_t half = format.block / 2;
    if (!in_halves(format)) return from(unpack_codes(format, codes, room), 0, count, from_codes<0, 8>);
    from(codes, 0, std::min(half, count), from_codes<0, 4>);
    from(codes, half, count, from_codes<4, 4>);
}

struct CodesOfBlock { float step; const uint8_t* codes; };
inline float* step_in(uint8_t* chunk, int64_t block) { return reinterpret_cast<float*>(chunk) + block; }
inline CodesOfBlock codes_in(const Quantize& format, const uint8_t* chunk, int64_t block) {
    return {reinterpret_cast<const float*>(chunk)[block], chunk + format.codes_at + block * format.block_bytes()};
}

inline FeedbackState at_position(FeedbackState state, int64_t position) {
    if (state.error) state.error += position;
    if (state.velocity) state.velocity += position;
    return state;
}

inline Philox random_of(const Quantize& format, const FeedbackState& state) {
    return {{uint32_t(format.seed), uint32_t(format.seed >> 32)}, {state.step, state.bucket, state.sender}};
}

void quantize_encode(const Quantize& format, const Layout& layout, Tensors gradients, FeedbackState state, uint8_t* chunks,
                     int threads) {
    const Philox random = random_of(format, state);
    const int64_t ahead = std::max(kAhead, format.block);
    with_element_type(gradients.dtype, [&](auto* type) {
        using G = std::remove_pointer_t<decltype(type)>;
        parallel(threads, [&](int t) {
            QuantizedBlock block(format);
            for_blocks(layout, format.block, t, threads, [&](int64_t i, int64_t first, int64_t count, int64_t position) {
                const int64_t shard = position / layout.shard_numel;
                const int64_t at = (position - shard * layout.shard_numel) / format.block;
                uint8_t* chunk = chunks + shard * format.chunk_bytes;
                const G* g = gradients.dtype == Dtype::none ? nullptr : static_cast<const G*>(gradients.data[i]) + first;
                const FeedbackState kept = at_position(state, position);
                const float *e = kept.error, *u = kept.velocity, scale = block.stage(g, kept, count);
                uint8_t* codes = chunk + format.codes_at + at * format.block_bytes();
                block.finish(scale, count, position, random, kept, step_in(chunk, at), codes, [=](int64_t row) {
                    for (int64_t j = row + ahead; j < row + ahead + kRow; j += kRow / 2) {
                        if (g) prefetch(g + j);
                        if (e) prefetch(e + j);
                        if (u) prefetch(u + j);
                    }
                });
            });
        });
    });
}

void quantize_serve(const Quantize& format, const Layout& layout, const uint8_t* pushed, int64_t workers, float weight,
                    FeedbackState state, uint8_t* chunk, int threads) {
    const Philox random = random_of(format, state);
    const int64_t ahead = std::max(kAhead, format.block), stride = format.block + 2 * kDigits;
    const float levels = float(format.levels);
    const int64_t half = format.block / 2;
    const bool halves = in_halves(format);
    parallel(threads, [&](int t) {
        QuantizedBlock block(format);
        std::vector<uint8_t> room(size_t(workers * stride));
        struct Pushed { const uint8_t* codes; float step; };
        std::vector<Pushed> pushes(size_t(workers), Pushed{});
        for_blocks(layout, format.block, t, threads, [&](int64_t, int64_t, int64_t count, int64_t position) {
            const int64_t at = position / format.block;
            const FeedbackState kept = at_position(state, position);
            for (int64_t w = 0; w < workers; w++) {
                const CodesOfBlock from = codes_in(format, pushed + w * format.chunk_bytes, at);
                for (int64_t b = 0; b < format.block_bytes(); b += 64) prefetch(from.codes + b + format.block_bytes());
                const uint8_t* codes = halves ? from.codes : unpack_codes(format, from.codes, &room[size_t(w * stride)]);
                pushes[size_t(w)] = {codes, from.step * weight};
            }
            const Pushed *begin = pushes.data(), *end = begin + workers;
            const float* e = kept.error;
            const float scale = block.stage_rows(
                count,
                [=](int64_t i, F8* v) {
                    for (int q = 0; q < 4; q++) v[q] = e ? load(e + i + 8 * q) : splat(0);
                    auto add_pushes = [=](int64_t byte, const auto& read) {
                        for (const Pushed* p = begin; p < end; p++)
                            for (int q = 0; q < 4; q++)
                                v[q] = add(v[q], mul(read(p->codes + byte + 8 * q, splat(levels)), splat(p->step)));
                    };
                    if (!halves) add_pushes(i, from_codes<0, 8>);
                    else if (i < half) add_pushes(i, from_codes<0, 4>);
                    else add_pushes(i - half, from_codes<4, 4>);
                },
                [=](int64_t i) {
                    float v = e ? e[i] : 0.f;
                    for (const Pushed* p = begin; p < end; p++) {
                        const int code = !halves ? p->codes[i] : i < half ? p->codes[i] & 15 : p->codes[i - half] >> 4;
                        v += (float(code) - levels) * p->step;
                    }
                    return v;
                });
            uint8_t* codes = chunk + format.codes_at + at * format.block_bytes();
            block.finish(scale, count, position, random, kept, step_in(chunk, at), codes, [=](int64_t row) {
                if (e) prefetch(e + row + ahead), prefetch(e + row + ahead + kRow / 2);
            });
        });
    });
}

void quantize_decode(const Quantize& format, const Layout& layout, const uint8_t* chunks, Tensors gradients, int threads) {
    with_element_type(gradients.dtype, [&](auto* type) {
        using G = std::remove_pointer_t<decltype(type)>;
        const bool large = layout.shards * layout.shard_numel * int64_t(sizeof(G)) >= kLarge;
        parallel(threads, [&](int t) {
            std::vector<uint8_t> room(size_t(format.block + 2 * kDigits));
            for_blocks(layout, format.block, t, threads, [&](int64_t i, int64_t first, int64_t count, int64_t position) {
                const int64_t shard = position / layout.shard_numel, inside = position - shard * layout.shard_numel;
                const CodesOfBlock from = codes_in(format, chunks + shard * format.chunk_bytes, inside / format.block);
                G* to = static_cast<G*>(gradients.data[i]) + first;
                if constexpr (std::is_same_v<G, float>) {
                    if (large && reinterpret_cast<uintptr_t>(to) % 32 == 0)
                        return expand(format, from.codes, from.step, count, room.data(), [to](int64_t at, F8 values, int valid) {
                            if (valid == 8) stream(to + at, values);
                            else put(to + at, values, valid);
                        });
                }
                expand(format, from.codes, from.step, count, room.data(),
                       [to](int64_t at, F8 values, int valid) { put(to + at, values, valid); });
            });
            stream_end();
        });
    });
}

void quantize_accumulate(const Quantize& format, const Layout& layout, const uint8_t* chunk, float weight, float* sum,
                         int threads) {
    parallel(threads, [&](int t) {
        std::vector<uint8_t> room(size_t(format.block + 2 * kDigits));
        for_blocks(layout, format.block, t, threads, [&](int64_t, int64_t, int64_t count, int64_t position) {
            const CodesOfBlock from = codes_in(format, chunk, position / format.block);
            float* to = sum + position;
            expand(format, from.codes, from.step * weight, count, room.data(),
                   [to](int64_t at, F8 values, int valid) { add_to(to + at, values, valid); });
        });
    });
}

bool quantize_is_within(const Quantize& format, const Layout& layout, const uint8_t* chunks, int64_t count, float limit) {
    const float most = bits_of(limit) == kMaxFinite ? limit : float(double(limit) / double(format.levels));  // of a step
    return all_within<float>(chunks, count, format.chunk_bytes, 0, layout.shard_numel / format.block, most);
}

constexpr decltype(Passes<Quantize>::fault) quantize_fault = nullptr;

}  // namespace
