// The k largest magnitudes of a shard, exactly: ties go to the lowest index. Included by each translation unit of kernels.
//
// One dense pass forms v = gradient + error, writes it where the error was, and collects the candidates over a threshold
// guessed from a sample; an exact radix selection then looks at the candidates only. Should the guess have been too high,
// or so low that candidates pile up, the selection runs over all elements instead: slower, the same result.

#include <memory>
#include <vector>

#include "parallel.h"
#include "walk.h"

namespace {

constexpr int64_t kRun = 65536;  // elements whose entries share a count, so that an offset fits 16 bits

constexpr uint32_t kAllNotFinite = 0xffffffffu;  // as the first count: the whole shard is NaN

constexpr int64_t kTile = 2048;   // elements that are worked on in the first-level cache
constexpr int64_t kAhead = 1024;  // elements between what is worked on and what is being fetched

inline uint32_t* counts_in(uint8_t* chunk) { return reinterpret_cast<uint32_t*>(chunk); }
inline const uint32_t* counts_in(const uint8_t* chunk) { return reinterpret_cast<const uint32_t*>(chunk); }
inline const uint16_t* offsets_in(const TopK& codec, const uint8_t* chunk) {
    return reinterpret_cast<const uint16_t*>(chunk + codec.offsets_at);
}

// What arrives of a value that is sent: itself, or its nearest half, which never overflows.
inline Half half_of(float v) {
    Half h;
    const float limit = 65504.f;
    from_float(v > limit ? limit : v < -limit ? -limit : v, &h);
    return h;
}
inline float value_in(const TopK& codec, const uint8_t* chunk, int64_t entry) {
    if (codec.half) return to_float(reinterpret_cast<const Half*>(chunk + codec.values_at)[entry]);
    return reinterpret_cast<const float*>(chunk + codec.values_at)[entry];
}
inline void set_entry(const TopK& codec, uint8_t* chunk, int64_t entry, uint32_t position, float v) {
    reinterpret_cast<uint16_t*>(chunk + codec.offsets_at)[entry] = uint16_t(position % kRun);
    if (codec.half) reinterpret_cast<Half*>(chunk + codec.values_at)[entry] = half_of(v);
    else reinterpret_cast<float*>(chunk + codec.values_at)[entry] = v;
    counts_in(chunk)[position / kRun]++;
}

struct Candidate { uint32_t position; float value; };  // position within the shard

// What one thread has found in its part of a shard, and its share of the common selection.
struct Finder {
    // Ascending. Where there is an error, it already holds what is left once they are sent.
    std::unique_ptr<Candidate[]> candidates;
    int64_t count = 0, room = 0;
    bool piled_up = false;             // more candidates than there is room for
    std::vector<uint32_t> not_finite;  // ascending, at most k + 1
    std::vector<uint32_t> histogram = std::vector<uint32_t>(2048);
    int64_t above = 0, equal = 0;      // how many exceed, how many equal the k-th largest magnitude

    void start(int64_t limit) {
        if (limit > room) {
            candidates.reset(new Candidate[size_t(limit)]);  // not initialized: what is not needed is never touched
            room = limit;
        }
        count = 0;
        piled_up = false;
        not_finite.clear();
    }
};

template <class G>
class ShardEncoder {
public:
    ShardEncoder(const TopK& codec, const Layout& layout, const void* const* gradients, float* error, uint8_t* chunks,
                 int threads)
        : codec_(codec), layout_(layout), gradients_(gradients), error_(error), chunks_(chunks), threads_(threads),
          barrier_(threads), finders_(size_t(threads)) {}

    // All threads call it, shard after shard.
    void encode(int t, int64_t shard) {
        if (t == 0) prepare(shard);
        barrier_.wait();
        Finder& mine = finders_[size_t(t)];
        collect(mine, begin(t), begin(t + 1));
        barrier_.wait();
        const bool finite = !any([](const Finder& f) { return !f.not_finite.empty(); });
        const bool guessed = found() >= need_ && !any([](const Finder& f) { return f.piled_up; });
        if (t == 0) {
            low_ = guessed ? threshold_ : 0;
            high_ = kMaxFinite + 1;
            remaining_ = need_;
        }
        barrier_.wait();  // all have read what all have found
        if (finite && guessed) {
            select(t, false, [&](const auto& visit) {
                for (const Candidate *c = mine.candidates.get(), *last = c + mine.count; c < last; c++) visit(c->position, c->value);
            });
        } else {
            take_back(mine);
            if (finite) select(t, true, [&](const auto& visit) { each_value(begin(t), begin(t + 1), visit); });
            else if (t == 0) send_not_finite();
        }
        barrier_.wait();
    }

private:
    int64_t begin(int t) const {  // of a thread's part: whole runs, so that no count has two writers
        const int64_t runs = ceil_div(layout_.shard_numel, kRun);
        return base_ + std::min(runs * t / threads_ * kRun, layout_.shard_numel);
    }
    float value(int64_t tensor, int64_t element, int64_t position) const {
        if (!gradients_) return error_[position];
        return to_float(static_cast<const G*>(gradients_[tensor])[element]) + (error_ ? error_[position] : 0.f);
    }
    template <class Test> bool any(const Test& test) const {
        for (const Finder& f : finders_) if (test(f)) return true;
        return false;
    }
    int64_t found() const {
        int64_t n = 0;
        for (const Finder& f : finders_) n += f.count;
        return n;
    }

    void prepare(int64_t shard) {
        base_ = shard * layout_.shard_numel;
        chunk_ = chunks_ + shard * codec_.chunk_bytes;
        int64_t real = 0;
        for_range(layout_, base_, base_ + layout_.shard_numel,
                  [&](int64_t, int64_t, int64_t count, int64_t) { real += count; });
        need_ = std::min(codec_.k, real);
        limit_ = (need_ * 4 + kRun) / threads_ + kRun;
        threshold_ = guess_threshold(real);
    }

    // The magnitude that a little more than the k largest should reach, from lines of 16 neighbours spread evenly.
    uint32_t guess_threshold(int64_t real) {
        const int64_t lines = std::max<int64_t>(real / 16, 1), wanted = std::clamp<int64_t>(real / 512, 1024, 16384) / 16;
        const int64_t step = std::max<int64_t>(lines / wanted, 1);
        sample_.clear();
        int64_t line = 0, next = 0;  // counted over the elements that are no padding
        for_range(layout_, base_, base_ + layout_.shard_numel,
                  [&](int64_t i, int64_t first, int64_t count, int64_t position) {
                      for (; next + 16 <= line + count; next += step * 16)
                          for (int64_t j = std::max(next, line); j < next + 16; j++)
                              sample_.push_back(magnitude(value(i, first + j - line, position + j - line)));
                      line += count;
                  });
        if (sample_.empty() || need_ == 0) return 1;
        const double expected = double(sample_.size()) * double(need_) / double(real);
        const auto rank = int64_t(expected + 3 * std::sqrt(expected)) + 4;
        if (rank >= int64_t(sample_.size())) return 1;
        std::nth_element(sample_.begin(), sample_.begin() + rank, sample_.end(), std::greater<uint32_t>());
        return std::clamp(sample_[size_t(rank)], 1u, kMaxFinite - 1);  // zeros are never candidates
    }

    // The dense pass, tile by tile: v over the error, and the hits while the tile is still in the first-level cache.
    void collect(Finder& mine, int64_t from, int64_t to) {
        mine.start(limit_);
        for_range(layout_, from, to, [&](int64_t tensor, int64_t first, int64_t count, int64_t position) {
            const G* g = gradients_ ? static_cast<const G*>(gradients_[tensor]) + first : nullptr;
            float* e = error_ ? error_ + position : nullptr;
            for (int64_t done = 0; done < count; done += kTile) {
                const int64_t size = std::min(kTile, count - done);
                const auto in_shard = uint32_t(position + done - base_);
                if (g && e) collect_tile<true, true>(mine, g + done, e + done, size, in_shard);
                else if (g) collect_tile<true, false>(mine, g + done, nullptr, size, in_shard);
                else collect_tile<false, true>(mine, nullptr, e + done, size, in_shard);
            }
        });
    }

    template <bool HasGradient, bool HasError>
    void collect_tile(Finder& mine, const G* g, float* e, int64_t count, uint32_t in_shard) {
        const F8 zero = splat(0);
        uint16_t found[kTile + 4];
        int64_t n = 0, i = 0;
        for (; i + 64 <= count; i += 64) {
            for (int64_t ahead = i + kAhead; ahead < i + kAhead + 64; ahead += 16) {
                if (HasGradient) prefetch(g + ahead);
                if (HasError) prefetch(e + ahead);
            }
            F8 v[8], largest = zero;
            for (int q = 0; q < 8; q++) {
                if (HasGradient) v[q] = add(load(g + i + 8 * q), HasError ? load(e + i + 8 * q) : zero);
                else v[q] = load(e + i + 8 * q);
                largest = larger_magnitude(largest, v[q]);
            }
            uint64_t hits;
            if (__builtin_expect(at_least(largest, kMaxFinite + 1), 0)) {
                hits = take_singly<HasGradient, HasError>(mine, g, e, i, i + 64, in_shard);
            } else {
                uint32_t half[2] = {0, 0};
                for (int q = 0; q < 8; q++) {
                    half[q / 4] |= at_least(v[q], threshold_) << (8 * q % 32);
                    if (HasGradient && HasError) store(e + i + 8 * q, v[q]);
                }
                hits = half[0] | uint64_t(half[1]) << 32;
            }
            n = add_places(hits, i, found, n);
        }
        if (i < count) n = add_places(take_singly<HasGradient, HasError>(mine, g, e, i, count, in_shard), i, found, n);

        if (mine.count + n > limit_) mine.piled_up = true;
        if (mine.piled_up) return;
        Candidate* next = mine.candidates.get() + mine.count;
        for (int64_t c = 0; c < n; c++) {
            const float v = HasError ? e[found[c]] : to_float(g[found[c]]) + 0.f;
            next[c] = {in_shard + found[c], v};
            if (HasError) e[found[c]] = left_over(v);
        }
        mine.count += n;
    }

    // Appends the places of the set bits. Four at a time, whether they are there or not: faster than guessing how many.
    static int64_t add_places(uint64_t bits, int64_t first, uint16_t* places, int64_t n) {
        const int64_t end = n + __builtin_popcountll(bits);
        do
            for (int j = 0; j < 4; j++, bits &= bits - 1)
                places[n + j] = uint16_t(first + __builtin_ctzll(bits | uint64_t(1) << 63));
        while ((n += 4) < end);
        return end;
    }

    // At most 64 values, some of which may not be finite: those are put aside, and their error stays as it was.
    template <bool HasGradient, bool HasError>
    uint64_t take_singly(Finder& mine, const G* g, float* e, int64_t from, int64_t to, uint32_t in_shard) {
        uint64_t hits = 0;
        for (int64_t j = from; j < to; j++) {
            const float v = HasGradient ? to_float(g[j]) + (HasError ? e[j] : 0.f) : e[j];
            if (magnitude(v) > kMaxFinite) {
                // One more than can be sent is enough to know.
                if (int64_t(mine.not_finite.size()) <= codec_.k) mine.not_finite.push_back(in_shard + uint32_t(j));
                continue;
            }
            if (HasGradient && HasError) e[j] = v;
            hits |= uint64_t(magnitude(v) >= threshold_) << (j - from);
        }
        return hits;
    }

    float left_over(float v) const { return codec_.half ? v - to_float(half_of(v)) : 0.f; }  // once v is sent

    // A shard with values that are not finite sends those and nothing else: its finite values wait in the error. Where
    // there are more than k of them, the whole shard travels as not finite.
    void send_not_finite() {
        int64_t total = 0, entry = 0;
        for (const Finder& f : finders_) total += int64_t(f.not_finite.size());
        if (total > codec_.k) {
            set_entry(codec_, chunk_, 0, 0, float_of(kNaN));
            counts_in(chunk_)[0] = kAllNotFinite;
            return;
        }
        for (const Finder& f : finders_)
            for (uint32_t position : f.not_finite) set_entry(codec_, chunk_, entry++, position, float_of(kNaN));
    }

    // Gives the candidates back to the error.
    void take_back(Finder& mine) {
        if (error_)
            for (int64_t c = 0; c < mine.count; c++)
                error_[base_ + mine.candidates[size_t(c)].position] = mine.candidates[size_t(c)].value;
        mine.count = 0;
    }

    // visit(position in the shard, value) for all values: the error holds them by now, where there is one.
    template <class Visit> void each_value(int64_t from, int64_t to, const Visit& visit) const {
        for_range(layout_, from, to, [&](int64_t tensor, int64_t first, int64_t count, int64_t position) {
            for (int64_t j = 0; j < count; j++)
                visit(uint32_t(position + j - base_), error_ ? error_[position + j] : value(tensor, first + j, position + j));
        });
    }

    // Finds the need_-th largest magnitude by narrowing the interval low_ .. high_ that it lies in, at most 2048 bins at a
    // time, and sends the entries in ascending order. values(visit) goes through this thread's part, in order; they lie
    // in the error where `in_error`, else the error holds what is left once they are sent.
    template <class Values> void select(int t, bool in_error, const Values& values) {
        Finder& mine = finders_[size_t(t)];
        mine.above = 0;
        for (bool first = true; high_ - low_ > 1; first = false) {
            std::fill(mine.histogram.begin(), mine.histogram.end(), 0);
            // The first bins are an octave's, over which candidates spread; what exceeds it shares the last bin.
            const uint32_t low = low_, octave = first && !in_error ? std::min(high_ - low, 1u << 23) : high_ - low;
            const int shift = std::max(0, 32 - __builtin_clz(octave - 1) - 11);
            const uint32_t inside = high_ - low, last = (octave - 1) >> shift;
            values([&](uint32_t, float v) {
                const uint32_t m = magnitude(v) - low;
                if (m < inside) mine.histogram[std::min(m >> shift, last)]++;
            });
            barrier_.wait();
            if (t == 0) {
                uint32_t bin = last;
                for (;; bin--) {
                    int64_t here = 0;
                    for (const Finder& f : finders_) here += f.histogram[bin];
                    if (here >= remaining_ || bin == 0) break;
                    remaining_ -= here;
                }
                low_ = low + (bin << shift);
                if (bin < last) high_ = low_ + (1u << shift);
                bin_ = bin;
            }
            barrier_.wait();
            for (uint32_t bin = bin_ + 1; bin <= last; bin++) mine.above += mine.histogram[bin];
            mine.equal = mine.histogram[bin_];
        }
        barrier_.wait();
        const uint32_t least = low_;
        int64_t entry = 0, ties = remaining_;  // before this thread's part: entries sent, ties still to give
        for (int other = 0; other < t; other++) {
            const Finder& f = finders_[size_t(other)];
            const int64_t given = std::min(f.equal, ties);
            entry += f.above + given;
            ties -= given;
        }
        const int64_t begin = entry;
        auto* offsets = reinterpret_cast<uint16_t*>(chunk_ + codec_.offsets_at);
        auto* full = reinterpret_cast<float*>(chunk_ + codec_.values_at);
        auto* half = reinterpret_cast<Half*>(chunk_ + codec_.values_at);
        uint32_t run = 0;
        int64_t run_begin = begin;
        values([&](uint32_t position, float v) {
            const uint32_t m = magnitude(v);
            const bool sent = m > least || (m == least && ties-- > 0);
            if (sent && entry < need_) {
                if (position / kRun != run) {
                    if (entry > run_begin) counts_in(chunk_)[run] = uint32_t(entry - run_begin);
                    run = uint32_t(position / kRun);
                    run_begin = entry;
                }
                offsets[entry] = uint16_t(position % kRun);
                if (codec_.half) half[entry] = half_of(v);
                else full[entry] = v;
                entry++;
            }
            if (error_ && sent == in_error) error_[base_ + position] = sent ? left_over(v) : v;
        });
        if (entry > run_begin) counts_in(chunk_)[run] = uint32_t(entry - run_begin);
    }

    const TopK& codec_;
    const Layout& layout_;
    const void* const* gradients_;
    float* error_;
    uint8_t* chunks_;
    const int threads_;
    Barrier barrier_;
    std::vector<Finder> finders_;
    std::vector<uint32_t> sample_;
    // of the shard at hand
    int64_t base_ = 0, need_ = 0, limit_ = 0, remaining_ = 0;
    uint8_t* chunk_ = nullptr;
    uint32_t threshold_ = 0, low_ = 0, high_ = 0, bin_ = 0;
};

void top_k_encode(const TopK& codec, const Layout& layout, Tensors gradients, float* error, uint8_t* chunks, int threads) {
    const void* const* data = gradients.dtype == Dtype::none ? nullptr : gradients.data;
    with_element_type(gradients.dtype, [&](auto* type) {
        ShardEncoder<std::remove_pointer_t<decltype(type)>> encoder(codec, layout, data, error, chunks, threads);
        parallel(threads, [&](int t) { for (int64_t shard = 0; shard < layout.shards; shard++) encoder.encode(t, shard); });
    });
}

template <class G> inline void copy_out(G* to, const G* from, int64_t count, bool large) {
    if constexpr (std::is_same_v<G, float>) {
        if (large && reinterpret_cast<uintptr_t>(to) % 32 == 0) {
            int64_t i = 0;
            for (; i + 8 <= count; i += 8) stream(to + i, load(from + i));
            to += i, from += i, count -= i;
        }
    }
    std::memcpy(static_cast<void*>(to), from, size_t(count) * sizeof(G));
}

template <class G>
void scatter(const TopK& codec, const Layout& layout, const uint8_t* chunks, void* const* gradients, int threads) {
    const int64_t runs = ceil_div(layout.shard_numel, kRun);
    std::vector<int64_t> first_entry(size_t(layout.shards * runs));
    for (int64_t s = 0; s < layout.shards; s++)
        for (int64_t r = 0, entry = 0; r < runs; r++) {
            first_entry[size_t(s * runs + r)] = entry;
            entry += counts_in(chunks + s * codec.chunk_bytes)[r];
        }
    const bool large = layout.shards * layout.shard_numel * int64_t(sizeof(G)) >= kLarge;
    parallel(threads, [&](int t) {
        std::vector<G> tile(size_t(kTile), G{});  // zeros, but for the entries at hand
        const int64_t total = layout.shards * runs;
        for (int64_t at = total * t / threads; at < total * (t + 1) / threads; at++) {
            const int64_t shard = at / runs, run = at % runs;
            const int64_t begin = shard * layout.shard_numel + run * kRun;
            const int64_t end = std::min(begin + kRun, (shard + 1) * layout.shard_numel);
            const uint8_t* chunk = chunks + shard * codec.chunk_bytes;
            if (counts_in(chunk)[0] == kAllNotFinite) {
                for_range(layout, begin, end, [&](int64_t tensor, int64_t first, int64_t count, int64_t) {
                    G* to = static_cast<G*>(gradients[tensor]) + first;
                    for (int64_t i = 0; i < count; i++) from_float(float_of(kNaN), to + i);
                });
                continue;
            }
            int64_t entry = first_entry[size_t(at)];
            const int64_t last = entry + counts_in(chunk)[run];
            for_range(layout, begin, end, [&](int64_t tensor, int64_t first, int64_t count, int64_t position) {
                G* to = static_cast<G*>(gradients[tensor]) + first;
                for (int64_t done = 0; done < count; done += kTile) {
                    const int64_t size = std::min(kTile, count - done), from = entry;
                    auto inside = [&](int64_t i) { return begin + offsets_in(codec, chunk)[i] - position - done; };
                    for (; entry < last && inside(entry) < size; entry++)
                        from_float(value_in(codec, chunk, entry), &tile[size_t(inside(entry))]);
                    copy_out(to + done, tile.data(), size, large);
                    for (int64_t i = from; i < entry; i++) from_float(0.f, &tile[size_t(inside(i))]);
                }
            });
        }
        stream_end();
    });
}

void top_k_decode(const TopK& codec, const Layout& layout, const uint8_t* chunks, Tensors gradients, int threads) {
    with_element_type(gradients.dtype, [&](auto* type) {
        scatter<std::remove_pointer_t<decltype(type)>>(codec, layout, chunks, gradients.data, threads);
    });
}

void top_k_accumulate(const TopK& codec, const Layout& layout, const uint8_t* chunk, float weight, float* sum) {
    FlushDenormals flush;
    if (counts_in(chunk)[0] == kAllNotFinite)
        return for_range(layout, 0, layout.shard_numel, [&](int64_t, int64_t, int64_t count, int64_t position) {
            std::fill(sum + position, sum + position + count, float_of(kNaN));
        });
    int64_t entry = 0;
    for (int64_t run = 0; run * kRun < layout.shard_numel; run++)
        for (const int64_t last = entry + counts_in(chunk)[run]; entry < last; entry++)
            sum[run * kRun + offsets_in(codec, chunk)[entry]] += value_in(codec, chunk, entry) * weight;
}

}  // namespace
