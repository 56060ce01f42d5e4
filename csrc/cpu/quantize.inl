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

// The elements of a byte lie far apart, so that adjacent bytes hold adjacent elements, and compilers can vectorize the loops.
inline void pack_codes(const Quantize& format, const uint8_t* c, uint8_t* out) {
    switch (format.bits) {
        case 0: {
            const int64_t m = ceil_div(format.block, kDigits);
            for (int64_t j = 0; j < m; j++)
                out[j] = uint8_t(c[j] + 3 * (c[m + j] + 3 * (c[2 * m + j] + 3 * (c[3 * m + j] + 3 * c[4 * m + j]))));
            break;
        }
        case 2: {
            const int64_t m = format.block / 4;
            for (int64_t j = 0; j < m; j++) out[j] = uint8_t(c[j] | c[m + j] << 2 | c[2 * m + j] << 4 | c[3 * m + j] << 6);
            break;
        }
        case 3: {
            const int64_t m = format.block / 8;
            for (int64_t j = 0; j < m; j++) {
                out[j] = uint8_t(c[j] | c[m + j] << 3 | c[2 * m + j] << 6);
                out[m + j] = uint8_t(c[2 * m + j] >> 2 | c[3 * m + j] << 1 | c[4 * m + j] << 4 | c[5 * m + j] << 7);
                out[2 * m + j] = uint8_t(c[5 * m + j] >> 1 | c[6 * m + j] << 2 | c[7 * m + j] << 5);
            }
            break;
        }
        case 4: {
            const int64_t m = format.block / 2;
            for (int64_t j = 0; j < m; j++) out[j] = uint8_t(c[j] | c[m + j] << 4);
            break;
        }
        default: std::memcpy(out, c, size_t(format.block));
    }
}

inline void unpack_codes(const Quantize& format, const uint8_t* in, uint8_t* c) {
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
                for (int64_t j = 0; j < m; j++) c[i * m + j] = in[j] >> (2 * i) & 3;
            break;
        }
        case 3: {
            const int64_t m = format.block / 8;
            for (int64_t j = 0; j < m; j++) {
                const unsigned x = in[j], y = in[m + j], z = in[2 * m + j];
                c[j] = x & 7;
                c[m + j] = x >> 3 & 7;
                c[2 * m + j] = uint8_t(x >> 6 | (y & 1) << 2);
                c[3 * m + j] = y >> 1 & 7;
                c[4 * m + j] = y >> 4 & 7;
                c[5 * m + j] = uint8_t(y >> 7 | (z & 3) << 1);
                c[6 * m + j] = z >> 2 & 7;
                c[7 * m + j] = uint8_t(z >> 5);
            }
            break;
        }
        case 4: {
            const int64_t m = format.block / 2;
            for (int64_t j = 0; j < m; j++) {
                c[j] = in[j] & 15;
                c[m + j] = in[j] >> 4;
            }
            break;
        }
        default: std::memcpy(c, in, size_t(format.block));
    }
}

// One block in the first-level cache, zero past its last element.
struct QuantizedBlock {
    explicit QuantizedBlock(const Quantize& format)
        : format(format), values(size_t(format.block)), velocities(size_t(format.block)),
          codes(size_t(format.block + 2 * kDigits)) {}

    const Quantize& format;
    std::vector<float> values, velocities;
    std::vector<uint8_t> codes;

    // v = gradient + error, with momentum * velocity; or the error alone.
    template <class G> void stage(const G* g, const FeedbackState& kept, int64_t count) {
        const float *e = kept.error, *u = kept.velocity, momentum = kept.momentum;
        float *v = values.data(), *w = velocities.data();
        const F8 m = splat(momentum);
        int64_t i = 0;
        for (; i + 8 <= count; i += 8) {
            F8 x = g ? load(g + i) : load(e + i);
            if (u) store(w + i, x = add(mul(m, load(u + i)), x));
            if (g && e) x = add(x, load(e + i));
            store(v + i, x);
        }
        for (; i < count; i++) {
            float x = g ? to_float(g[i]) : e[i];
            if (u) w[i] = x = momentum * u[i] + x;
            if (g && e) x = x + e[i];
            v[i] = x;
        }
        std::fill(v + count, v + format.block, 0.f);
    }

    // Adds the values that a worker has sent.
    void add_codes(const uint8_t* from, float step, int64_t count) {
        unpack_codes(format, from, codes.data());
        // Digits past the last element: a corrupted push may have any there, and the reply would repeat them.
        std::fill(codes.begin() + format.block, codes.end(), uint8_t(0));
        const F8 s = splat(step), levels = splat(float(format.levels));
        const int64_t padded = ceil_div(count, 8) * 8;
        for (int64_t i = 0; i < padded; i += 8)
            store(&values[size_t(i)], add(load(&values[size_t(i)]), mul(sub(from_bytes(&codes[size_t(i)]), levels), s)));
        std::fill(values.begin() + count, values.begin() + padded, 0.f);
    }

    float scale() const {
        const float* v = values.data();
        if (format.l2) {
            RowSum sum;
            for (int64_t i = 0; i < format.block;) {
                for (const int64_t end = std::min(i + kGroup, format.block); i < end; i += kRow)
                    for (int q = 0; q < 4; q++) sum.group[q] = add(sum.group[q], mul(load(v + i + 8 * q), load(v + i + 8 * q)));
                if (i % kGroup == 0) sum.close_group();
            }
            return std::sqrt(sum.finish());
        }
        F8 largest[2] = {splat(0), splat(0)};
        for (int64_t i = 0; i < format.block; i += 16)
            for (int q = 0; q < 2; q++) largest[q] = larger_magnitude(largest[q], load(v + i + 8 * q));
        float lanes[8];
        store(lanes, larger_magnitude(largest[0], largest[1]));
        uint32_t most = 0;
        for (float lane : lanes) most = std::max(most, magnitude(lane));
        return float_of(most);
    }

    // Writes the payload of the block, and error and velocity, if any. `position` selects the random numbers.
    void finish(int64_t count, int64_t position, const Philox& random, const FeedbackState& kept, float* step, uint8_t* out) {
        float *error = kept.error, *velocity = kept.velocity;
        const float s = scale(), levels = float(format.levels);
        if (!(s <= float_of(kMaxFinite))) {
            *step = float_of(kNaN);
            return;
        }
        *step = std::min(s / levels, widest_step(levels));  // what readers make of the outermost level must be finite
        const float shrink = shrink_of(s), inverse = std::min(levels / (s * shrink), float_of(kMaxFinite));
        const F8 by = splat(inverse), smaller = splat(shrink), width = splat(*step), most = splat(levels);
        F8 r[8];
        for (F8& half : r) half = splat(0.5f);
        for (int64_t i = 0; i < format.block; i += 8) {
            if (format.stochastic && i % 64 == 0) uniforms(random, uint64_t(position + i) / 8, r);
            const F8 v = load(&values[size_t(i)]);
            const F8 level = truncated(add(mul(mul(abs(v), smaller), by), r[i / 8 % 8]), most);
            const F8 signed_level = with_sign_of(level, v), sent = mul(signed_level, width);
            to_bytes(add(signed_level, most), &codes[size_t(i)]);
            if (error && i + 8 <= count) {
                store(error + i, sub(v, sent));
                if (velocity) store(velocity + i, where_zero(load(&velocities[size_t(i)]), level));
            } else if (error && i < count) {
                float rest[8], levels_here[8];
                store(rest, sub(v, sent));
                store(levels_here, level);
                for (int64_t j = i; j < count; j++) {
                    error[j] = rest[j - i];
                    if (velocity) velocity[j] = levels_here[j - i] == 0.f ? velocities[size_t(j)] : 0.f;
                }
            }
        }
        pack_codes(format, codes.data(), out);
    }
};

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
                block.stage(g, kept, count);
                uint8_t* codes = chunk + format.codes_at + at * format.block_bytes();
                block.finish(count, position, random, kept, step_in(chunk, at), codes);
            });
        });
    });
}

void quantize_serve(const Quantize& format, const Layout& layout, const uint8_t* pushed, int64_t workers, float weight,
                    FeedbackState state, uint8_t* chunk, int threads) {
    const Philox random = random_of(format, state);
    parallel(threads, [&](int t) {
        QuantizedBlock block(format);
        std::vector<float> zeros(size_t(format.block));
        for_blocks(layout, format.block, t, threads, [&](int64_t, int64_t, int64_t count, int64_t position) {
            const int64_t at = position / format.block;
            const FeedbackState kept = at_position(state, position);
            block.stage<float>(nullptr, kept.error ? kept : FeedbackState{zeros.data()}, count);
            for (int64_t w = 0; w < workers; w++) {
                const CodesOfBlock from = codes_in(format, pushed + w * format.chunk_bytes, at);
                block.add_codes(from.codes, from.step * weight, count);
            }
            uint8_t* codes = chunk + format.codes_at + at * format.block_bytes();
            block.finish(count, position, random, kept, step_in(chunk, at), codes);
        });
    });
}

void quantize_decode(const Quantize& format, const Layout& layout, const uint8_t* chunks, Tensors gradients, int threads) {
    with_element_type(gradients.dtype, [&](auto* type) {
        using G = std::remove_pointer_t<decltype(type)>;
        const bool large = layout.shards * layout.shard_numel * int64_t(sizeof(G)) >= kLarge;
        parallel(threads, [&](int t) {
            std::vector<uint8_t> codes(size_t(format.block + 2 * kDigits));
            const F8 levels = splat(float(format.levels));
            for_blocks(layout, format.block, t, threads, [&](int64_t i, int64_t first, int64_t count, int64_t position) {
                const int64_t shard = position / layout.shard_numel, inside = position - shard * layout.shard_numel;
                const CodesOfBlock from = codes_in(format, chunks + shard * format.chunk_bytes, inside / format.block);
                unpack_codes(format, from.codes, codes.data());
                G* to = static_cast<G*>(gradients.data[i]) + first;
                const F8 step = splat(from.step);
                const bool past_caches = large && reinterpret_cast<uintptr_t>(to) % 32 == 0;
                for (int64_t j = 0; j < count; j += 8) {
                    const F8 values = mul(sub(from_bytes(&codes[size_t(j)]), levels), step);
                    if constexpr (std::is_same_v<G, float>) {
                        if (past_caches && j + 8 <= count) {
                            stream(to + j, values);
                            continue;
                        }
                    }
                    put(to + j, values, int(std::min<int64_t>(8, count - j)));
                }
            });
            stream_end();
        });
    });
}

void quantize_accumulate(const Quantize& format, const Layout& layout, const uint8_t* chunk, float weight, float* sum,
                         int threads) {
    parallel(threads, [&](int t) {
        std::vector<uint8_t> codes(size_t(format.block + 2 * kDigits));
        const F8 levels = splat(float(format.levels));
        for_blocks(layout, format.block, t, threads, [&](int64_t, int64_t, int64_t count, int64_t position) {
            const CodesOfBlock from = codes_in(format, chunk, position / format.block);
            unpack_codes(format, from.codes, codes.data());
            const F8 step = splat(from.step * weight);
            for (int64_t j = 0; j < count; j += 8) {
                const F8 values = mul(sub(from_bytes(&codes[size_t(j)]), levels), step);
                float* to = sum + position + j;
                if (j + 8 <= count) {
                    store(to, add(load(to), values));
                    continue;
                }
                float v[8];
                store(v, values);
                for (int64_t k = j; k < count; k++) sum[position + k] += v[k - j];
            }
        });
    });
}

bool quantize_is_within(const Quantize& format, const Layout& layout, const uint8_t* chunks, int64_t count, float limit) {
    const float most = bits_of(limit) == kMaxFinite ? limit : float(double(limit) / double(format.levels));  // of a step
    return all_within<float>(chunks, count, format.chunk_bytes, 0, layout.shard_numel / format.block, most);
}

constexpr decltype(Passes<Quantize>::fault) quantize_fault = nullptr;

}  // namespace
