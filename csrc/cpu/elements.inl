// Element-wise formats: all elements as floats of 16 or 32 bits (Cast), or a few of them at random positions that all ranks
// draw alike (RandomK). Included by each translation unit of kernels.

#include <cmath>
#include <vector>

#include "parallel.h"
#include "random.inl"
#include "top_k.inl"
#include "walk.h"

namespace {

// The terms of v from some element on: gradient, error and velocity, or the error alone.
template <class G>
struct Terms {
    const G* g;
    float *e, *u;
    float momentum;

    F8 eight(int64_t i, F8& velocity) const {
        F8 v = g ? load(g + i) : load(e + i);
        if (u) v = velocity = add(mul(splat(momentum), load(u + i)), v);
        return g && e ? add(v, load(e + i)) : v;
    }
    float one(int64_t i, float& velocity) const {
        float v = g ? to_float(g[i]) : e[i];
        if (u) v = velocity = momentum * u[i] + v;
        return g && e ? v + e[i] : v;
    }
    // Restores error and velocity, up to rounding, after v and the new velocity have been stored in their places.
    void roll_back(int64_t i) const {
        const float own = to_float(g[i]);
        e[i] = limited(e[i] - (u ? u[i] : own), float_of(kMaxFinite));  // rounding may take it past the largest
        if (u) u[i] = limited((u[i] - own) / momentum, float_of(kMaxFinite));
    }
};

template <class G>
Terms<G> terms_at(Tensors gradients, const FeedbackState& state, int64_t tensor, int64_t first, int64_t position) {
    return {gradients.dtype == Dtype::none ? nullptr : static_cast<const G*>(gradients.data[tensor]) + first,
            state.error ? state.error + position : nullptr, state.velocity ? state.velocity + position : nullptr,
            state.momentum};
}

// Calls eight(i, v, velocity) for eight adjacent finite values, and one(i, v, velocity) or not_finite(i) for the others.
template <class Terms, class Eight, class One, class NotFinite>
inline void for_values(const Terms& terms, int64_t count, const Eight& eight, const One& one, const NotFinite& not_finite) {
    auto singly = [&](int64_t from, int64_t to) {
        for (; from < to; from++) {
            float velocity = 0.f;
            const float v = terms.one(from, velocity);
            if (magnitude(v) > kMaxFinite) not_finite(from);
            else one(from, v, velocity);
        }
    };
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        F8 velocity = splat(0);
        const F8 v = terms.eight(i, velocity);
        if (__builtin_expect(at_least(v, kMaxFinite + 1), 0)) singly(i, i + 8);
        else eight(i, v, velocity);
    }
    singly(i, count);
}

// Calls visit(shard, tensor, first, count, position) for part t of all elements. No call spans two shards.
template <class Visit>
void for_part(const Layout& layout, int t, int threads, const Visit& visit) {
    auto begin = [&](int part) { return layout.shards * layout.shard_numel / 32 * part / threads * 32; };
    for (int64_t from = begin(t), to; from < begin(t + 1); from = to) {
        const int64_t shard = from / layout.shard_numel;
        to = std::min(begin(t + 1), (shard + 1) * layout.shard_numel);
        for_range(layout, from, to, [&](int64_t tensor, int64_t first, int64_t count, int64_t position) {
            visit(shard, tensor, first, count, position);
        });
    }
}

// ---- Cast

// The address of the value at a position.
template <class H>
inline H* cast_at(const Cast& format, const Layout& layout, uint8_t* chunks, int64_t shard, int64_t position) {
    return reinterpret_cast<H*>(chunks + shard * format.chunk_bytes) + position - shard * layout.shard_numel;
}
template <class H>
inline const H* cast_at(const Cast& format, const Layout& layout, const uint8_t* chunks, int64_t shard, int64_t position) {
    return reinterpret_cast<const H*>(chunks + shard * format.chunk_bytes) + position - shard * layout.shard_numel;
}

// Calls call(type), where type is a null pointer to the type of the values in a chunk.
template <class Call> auto with_cast_type(const Cast& format, const Call& call) {
    switch (format.dtype) {
        case Dtype::float32: return call(static_cast<float*>(nullptr));
        case Dtype::float16: return call(static_cast<Half*>(nullptr));
        default: return call(static_cast<BFloat16*>(nullptr));
    }
}

template <class H, class Terms> inline void cast_values(const Terms& terms, int64_t count, H* out) {
    const float largest = largest_of(out);
    float *e = terms.e, *u = terms.u;
    for_values(
        terms, count,
        [=](int64_t i, F8 v, F8 velocity) {
            store(out + i, limited(v, largest));
            if (e) store(e + i, sub(v, load(out + i)));
            if (u) store(u + i, velocity);
        },
        [=](int64_t i, float v, float velocity) {
            from_float(limited(v, largest), out + i);
            if (e) e[i] = v - to_float(out[i]);
            if (u) u[i] = velocity;
        },
        [=](int64_t i) { from_float(float_of(kNaN), out + i); });
}

void cast_encode(const Cast& format, const Layout& layout, Tensors gradients, FeedbackState state, uint8_t* chunks,
                 int threads) {
    with_element_type(gradients.dtype, [&](auto* gradient_type) {
        with_cast_type(format, [&](auto* type) {
            using G = std::remove_pointer_t<decltype(gradient_type)>;
            using H = std::remove_pointer_t<decltype(type)>;
            parallel(threads, [&](int t) {
                for_part(layout, t, threads, [&](int64_t shard, int64_t tensor, int64_t first, int64_t count, int64_t at) {
                    cast_values(terms_at<G>(gradients, state, tensor, first, at), count,
                                cast_at<H>(format, layout, chunks, shard, at));
                });
            });
        });
    });
}

template <class H, class G> inline void convert(const H* from, G* to, int64_t count, bool large) {
    int64_t i = 0;
    if constexpr (std::is_same_v<G, float> && !std::is_same_v<H, float>)  // a mere copy is slower past the caches
        if (large && reinterpret_cast<uintptr_t>(to) % 32 == 0)
            for (; i + 8 <= count; i += 8) stream(to + i, load(from + i));
    for (; i + 8 <= count; i += 8) store(to + i, load(from + i));
    for (; i < count; i++) from_float(to_float(from[i]), to + i);
}

void cast_decode(const Cast& format, const Layout& layout, const uint8_t* chunks, Tensors gradients, int threads) {
    with_element_type(gradients.dtype, [&](auto* gradient_type) {
        with_cast_type(format, [&](auto* type) {
            using G = std::remove_pointer_t<decltype(gradient_type)>;
            using H = std::remove_pointer_t<decltype(type)>;
            const bool large = layout.shards * layout.shard_numel * int64_t(sizeof(G)) >= kLarge;
            parallel(threads, [&](int t) {
                for_part(layout, t, threads, [&](int64_t shard, int64_t tensor, int64_t first, int64_t count, int64_t at) {
                    convert(cast_at<H>(format, layout, chunks, shard, at),
                            static_cast<G*>(gradients.data[tensor]) + first, count, large);
                });
                stream_end();
            });
        });
    });
}

void cast_accumulate(const Cast& format, const Layout& layout, const uint8_t* chunk, float weight, float* sum, int threads) {
    with_cast_type(format, [&](auto* type) {
        using H = std::remove_pointer_t<decltype(type)>;
        parallel(threads, [&](int t) {
            for_part(layout, t, threads, [&](int64_t, int64_t, int64_t, int64_t count, int64_t position) {
                const H* from = cast_at<H>(format, layout, chunk, 0, position);
                float* to = sum + position;
                const F8 w = splat(weight);
                int64_t i = 0;
                for (; i + 8 <= count; i += 8) store(to + i, add(load(to + i), mul(load(from + i), w)));
                for (; i < count; i++) to[i] += to_float(from[i]) * weight;
            });
        });
    });
}

bool cast_is_within(const Cast& format, const Layout& layout, const uint8_t* chunks, int64_t count, float limit) {
    return with_cast_type(format, [&](auto* type) {
        using H = std::remove_pointer_t<decltype(type)>;
        return all_within<H>(chunks, count, format.chunk_bytes, 0, layout.shard_numel, limit);
    });
}

// The terms of a server's v from some element on: the error, and what each worker has pushed.
template <class H>
struct ServerTerms {
    const H* pushed;
    int64_t workers, stride;
    float weight;
    float *e, *u;  // there is no velocity

    F8 eight(int64_t i, F8&) const {
        F8 v = e ? load(e + i) : splat(0);
        for (int64_t w = 0; w < workers; w++) v = add(v, mul(load(pushed + w * stride + i), splat(weight)));
        return v;
    }
    float one(int64_t i, float&) const {
        float v = e ? e[i] : 0.f;
        for (int64_t w = 0; w < workers; w++) v += to_float(pushed[w * stride + i]) * weight;
        return v;
    }
};

void cast_serve(const Cast& format, const Layout& layout, const uint8_t* pushed, int64_t workers, float weight,
                FeedbackState state, uint8_t* chunk, int threads) {
    with_cast_type(format, [&](auto* type) {
        using H = std::remove_pointer_t<decltype(type)>;
        parallel(threads, [&](int t) {
            for_part(layout, t, threads, [&](int64_t, int64_t, int64_t, int64_t count, int64_t at) {
                const ServerTerms<H> terms = {cast_at<H>(format, layout, pushed, 0, at), workers,
                                              format.chunk_bytes / int64_t(sizeof(H)), weight,
                                              state.error ? state.error + at : nullptr, nullptr};
                cast_values(terms, count, cast_at<H>(format, layout, chunk, 0, at));
            });
        });
    });
}

constexpr decltype(Passes<Cast>::fault) cast_fault = nullptr;

// ---- RandomK

constexpr uint32_t kDrawing = 0x72616e64u;  // distinguishes the key from that of stochastic rounding with the same seed

inline RandomK::Header& header_of(uint8_t* chunk) { return *reinterpret_cast<RandomK::Header*>(chunk); }
inline const RandomK::Header& header_of(const uint8_t* chunk) { return *reinterpret_cast<const RandomK::Header*>(chunk); }

// The first element of a stratum.
inline int64_t stratum_at(const RandomK& format, const Layout& layout, int64_t stratum) {
    return int64_t(uint64_t(stratum) * uint64_t(layout.shard_numel) / uint64_t(format.k));
}

// Draws one position in each of a shard's equal strata, starting at some stratum.
class Draws {
public:
    Draws(const RandomK& format, const Layout& layout, const RandomK::Header& header, int64_t stratum)
        : random_{{uint32_t(format.seed), uint32_t(format.seed >> 32) ^ kDrawing}, {header.step, header.bucket, header.shard}},
          k_(uint64_t(format.k)), length_(uint64_t(layout.shard_numel) / k_), rest_(uint64_t(layout.shard_numel) % k_),
          stratum_(uint64_t(stratum)), begin_(uint64_t(stratum_at(format, layout, stratum))), over_(stratum_ * rest_ % k_) {
        random_rows(random_, stratum_ / 32 * 8, words_);
    }
    int64_t next() {
        if (stratum_ % 32 == 0) random_rows(random_, stratum_ / 4, words_);
        const uint64_t word = words_[stratum_ % 32 / 4][stratum_ % 4], begin = begin_;
        over_ += rest_;
        begin_ += length_ + (over_ >= k_);
        over_ -= over_ >= k_ ? k_ : 0;
        stratum_++;
        return int64_t(begin + (word * (begin_ - begin) >> 32));
    }

private:
    const Philox random_;
    const uint64_t k_, length_, rest_;  // of a shard over k
    uint64_t stratum_, begin_, over_;   // the next stratum, where it begins, and what is left over there
    uint32_t words_[8][4];
};

// Calls visit(stratum, tensor, element, position) for the positions drawn in strata from .. to of a shard, padding left out.
template <class Visit>
void for_drawn(const RandomK& format, const Layout& layout, const RandomK::Header& header, int64_t shard, int64_t from,
               int64_t to, const Visit& visit) {
    Draws draws(format, layout, header, from);
    const int64_t base = shard * layout.shard_numel, *end = layout.offset + layout.tensors;
    int64_t tensor = std::upper_bound(layout.offset, end, base + stratum_at(format, layout, from)) - layout.offset;
    tensor = std::max<int64_t>(tensor - 1, 0);
    for (int64_t i = from; i < to; i++) {
        const int64_t position = base + draws.next();
        while (tensor < layout.tensors && position >= layout.offset[tensor] + layout.numel[tensor]) tensor++;
        if (tensor < layout.tensors && position >= layout.offset[tensor])
            visit(i, tensor, position - layout.offset[tensor], position);
    }
}

inline float sent_value(const RandomK& format, const uint8_t* chunk, int64_t i) {
    const uint8_t* values = chunk + sizeof(RandomK::Header);
    return format.half ? to_float(reinterpret_cast<const Half*>(values)[i]) : reinterpret_cast<const float*>(values)[i];
}
// Returns the value that readers will see.
inline float send_value(const RandomK& format, uint8_t* chunk, int64_t i, float v) {
    uint8_t* values = chunk + sizeof(RandomK::Header);
    if (format.half) reinterpret_cast<Half*>(values)[i] = half_of(v);
    else reinterpret_cast<float*>(values)[i] = v;
    return sent_value(format, chunk, i);
}

// The dense pass stores v in place of the error. Only then is it known whether a shard is finite: if so, the elements drawn are
// sent, otherwise the pass is rolled back.
template <class G>
void draw(const RandomK& format, const Layout& layout, Tensors gradients, FeedbackState state, uint8_t* chunks, int threads) {
    std::vector<std::vector<int64_t>> nonfinite(size_t(threads), std::vector<int64_t>{});  // positions that are not finite
    parallel(threads, [&](int t) {
        for_part(layout, t, threads, [&](int64_t shard, int64_t tensor, int64_t first, int64_t count, int64_t position) {
            const auto terms = terms_at<G>(gradients, state, tensor, first, position);
            float *e = terms.g ? terms.e : nullptr, *u = terms.u;  // without gradients, v is there already
            auto& here = nonfinite[size_t(t)];
            for_values(
                terms, count,
                [=](int64_t i, F8 v, F8 velocity) {
                    if (e) store(e + i, v);
                    if (u) store(u + i, velocity);
                },
                [=](int64_t i, float v, float velocity) {
                    if (e) e[i] = v;
                    if (u) u[i] = velocity;
                },
                [&](int64_t i) { here.push_back(position + i); });
        });
    });
    std::vector<uint8_t> finite(size_t(layout.shards), 1);
    for (const auto& positions : nonfinite)
        for (int64_t position : positions) finite[size_t(position / layout.shard_numel)] = 0;
    parallel(threads, [&](int t) {
        auto next = nonfinite[size_t(t)].begin();
        for_part(layout, t, threads, [&](int64_t shard, int64_t tensor, int64_t first, int64_t count, int64_t position) {
            const auto terms = terms_at<G>(gradients, state, tensor, first, position);
            if (finite[size_t(shard)] || !terms.g || !terms.e) return;
            for (int64_t i = 0; i < count; i++) {
                if (next != nonfinite[size_t(t)].end() && *next == position + i) next++;
                else terms.roll_back(i);
            }
        });
        for (int64_t shard = 0; shard < layout.shards; shard++) {
            uint8_t* chunk = chunks + shard * format.chunk_bytes;
            RandomK::Header header = {state.step, state.bucket, state.first_shard + uint32_t(shard), uint32_t(format.k)};
            if (!finite[size_t(shard)]) header.k = kAllNotFinite;
            if (t == 0) header_of(chunk) = header;
            if (!finite[size_t(shard)]) {
                if (t == 0) send_value(format, chunk, 0, float_of(kNaN));
                continue;
            }
            for_drawn(format, layout, header, shard, format.k * t / threads, format.k * (t + 1) / threads,
                      [&](int64_t i, int64_t tensor, int64_t element, int64_t position) {
                          const auto terms = terms_at<G>(gradients, state, tensor, element, position);
                          const float v = terms.e ? *terms.e : to_float(*terms.g);
                          const float arrives = send_value(format, chunk, i, v);
                          if (terms.e) *terms.e = v - arrives;
                          if (terms.u) *terms.u = 0.f;
                      });
        }
    });
}

void random_k_encode(const RandomK& format, const Layout& layout, Tensors gradients, FeedbackState state, uint8_t* chunks,
                     int threads) {
    with_element_type(gradients.dtype, [&](auto* type) {
        draw<std::remove_pointer_t<decltype(type)>>(format, layout, gradients, state, chunks, threads);
    });
}

template <class G>
void scatter_drawn(const RandomK& format, const Layout& layout, const uint8_t* chunks, void* const* gradients, int threads) {
    const bool large = layout.shards * layout.shard_numel * int64_t(sizeof(G)) >= kLarge;
    parallel(threads, [&](int t) {
        std::vector<G> tile(size_t(kTile), G{});  // zeros, except for the elements drawn
        for (int64_t shard = 0; shard < layout.shards; shard++) {
            const uint8_t* chunk = chunks + shard * format.chunk_bytes;
            const bool finite = header_of(chunk).k != kAllNotFinite;
            int64_t i = format.k * t / threads;
            const int64_t last = format.k * (t + 1) / threads, base = shard * layout.shard_numel;
            Draws draws(format, layout, header_of(chunk), i);
            auto next = [&] { return i < last && finite ? base + draws.next() : INT64_MAX; };
            int64_t drawn = next();
            for_range(layout, base + stratum_at(format, layout, i), base + stratum_at(format, layout, last),
                      [&](int64_t tensor, int64_t first, int64_t count, int64_t position) {
                          G* to = static_cast<G*>(gradients[tensor]) + first;
                          if (!finite) {
                              for (int64_t j = 0; j < count; j++) from_float(float_of(kNaN), to + j);
                              return;
                          }
                          for (; drawn < position; i++, drawn = next()) {}  // padding
                          for (int64_t done = 0; done < count; done += kTile) {
                              const int64_t size = std::min(kTile, count - done), begin = position + done;
                              bool any = false;
                              for (; drawn < begin + size; i++, drawn = next(), any = true)
                                  from_float(sent_value(format, chunk, i), &tile[size_t(drawn - begin)]);
                              copy_out(to + done, tile.data(), size, large);
                              if (any) std::fill(tile.begin(), tile.begin() + size, G{});
                          }
                      });
        }
        stream_end();
    });
}

void random_k_decode(const RandomK& format, const Layout& layout, const uint8_t* chunks, Tensors gradients, int threads) {
    with_element_type(gradients.dtype, [&](auto* type) {
        scatter_drawn<std::remove_pointer_t<decltype(type)>>(format, layout, chunks, gradients.data, threads);
    });
}

void random_k_accumulate(const RandomK& format, const Layout& layout, const uint8_t* chunk, float weight, float* sum,
                         int threads) {
    if (header_of(chunk).k == kAllNotFinite)
        return for_range(layout, 0, layout.shard_numel, [&](int64_t, int64_t, int64_t count, int64_t position) {
            std::fill(sum + position, sum + position + count, float_of(kNaN));
        });
    parallel(threads, [&](int t) {
        for_drawn(format, layout, header_of(chunk), 0, format.k * t / threads, format.k * (t + 1) / threads,
                  [&](int64_t i, int64_t, int64_t, int64_t position) {
                      sum[position] += sent_value(format, chunk, i) * weight;
                  });
    });
}

bool random_k_is_within(const RandomK& format, const Layout&, const uint8_t* chunks, int64_t count, float limit) {
    constexpr auto values_at = int64_t(sizeof(RandomK::Header));
    return format.half ? all_within<Half>(chunks, count, format.chunk_bytes, values_at, format.k, limit)
                      : all_within<float>(chunks, count, format.chunk_bytes, values_at, format.k, limit);
}

constexpr decltype(Passes<RandomK>::serve) random_k_serve = nullptr;

const char* random_k_fault(const RandomK& format, const Layout& layout, const uint8_t* chunks) {
    for (int64_t shard = 0; shard < layout.shards; shard++) {
        const uint8_t* chunk = chunks + shard * format.chunk_bytes;
        const uint32_t k = header_of(chunk).k;
        const bool all_not_finite = k == kAllNotFinite && std::isnan(sent_value(format, chunk, 0));
        if (k != format.k && !all_not_finite) return "another k than the layout's";
    }
    return nullptr;
}

}  // namespace
