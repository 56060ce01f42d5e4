// The k largest magnitudes of a shard, exactly: ties go to the lowest index. Included by each translation unit of kernels.
//
// One dense pass computes v = gradient + error, stores it in place of the error, and collects the candidates above a threshold
// estimated from a sample. An exact radix selection then reads the candidates only. If the estimate was too high, or so low
// that there is no room for all candidates, the selection reads all elements instead: slower, with the same result.
#pragma once

#include <memory>
#include <vector>

#include "parallel.h"
#include "sums.h"
#include "walk.h"
#include "within.h"

namespace {

constexpr int64_t kRun = 65536;    // elements whose entries share a count, so that an offset fits 16 bits
constexpr int64_t kEntries = 64;   // entries that share a magnitude, where only their signs travel

constexpr uint32_t kAllNotFinite = 0xffffffffu;  // as the first count: the whole shard is NaN

constexpr int64_t kTile = 2048;   // elements that stay in the first-level cache
constexpr int64_t kAheadOfEntries = 32;

inline uint32_t* counts_in(uint8_t* chunk) { return reinterpret_cast<uint32_t*>(chunk); }
inline const uint32_t* counts_in(const uint8_t* chunk) { return reinterpret_cast<const uint32_t*>(chunk); }
inline int64_t run_numel(const Layout& layout, int64_t run) { return std::min(kRun, layout.shard_numel - run * kRun); }

inline Half half_of(float v) {
    Half h;
    from_float(v, &h);
    return h;
}

// Where the entries of a run begin in a chunk: entries before them, and bytes in each part (kernels/formats.py).
struct Place {
    int64_t entries = 0, scales = 0, upper = 0, low = 0;
};

inline int width(const TopK& format) { return format.low_bits + (format.values == Values::sign); }
inline int64_t upper_bytes(const TopK& format, int64_t numel, int64_t entries) {
    const int64_t rows = ceil_div(numel, int64_t(1) << format.low_bits);
    return ceil_div(rows + (format.low_bits ? entries : 0), 8);
}
// Moves on to the next run.
inline void advance(const TopK& format, int64_t numel, int64_t entries, Place& at) {
    at.entries += entries;
    at.scales += ceil_div(entries, kEntries) * int64_t(sizeof(BFloat16));
    at.upper += upper_bytes(format, numel, entries);
    at.low += ceil_div(entries * width(format), 8);
}

// Writes fields of equal width, packed from the lowest bit of a byte on.
class FieldWriter {
public:
    FieldWriter(uint8_t* to, int width) : to_(to), width_(width) {}
    void put(uint32_t field) {
        pending_ |= uint64_t(field) << bits_;
        bits_ += width_;
        if (bits_ < 32) return;
        const auto low = uint32_t(pending_);
        std::memcpy(to_, &low, 4);
        to_ += 4;
        pending_ >>= 32;
        bits_ -= 32;
    }
    void finish() { std::memcpy(to_, &pending_, size_t(ceil_div(bits_, 8))); }

private:
    uint8_t* to_;
    const int width_;
    uint64_t pending_ = 0;
    int bits_ = 0;
};

// Reads such fields. It accesses up to 8 bytes past the last one.
class FieldReader {
public:
    FieldReader(const uint8_t* from, int width) : from_(from), width_(width), mask_((1u << width) - 1) {}
    uint32_t take() {
        uint64_t word;
        std::memcpy(&word, from_ + bit_ / 8, 8);
        const auto field = uint32_t(word >> bit_ % 8) & mask_;
        bit_ += width_;
        return field;
    }

private:
    const uint8_t* from_;
    const int64_t width_;
    const uint32_t mask_;
    int64_t bit_ = 0;
};

// Calls visit(entry, offset, sign bit of a float) for at most `count` entries of a run, and returns how many there are. In a
// corrupted payload these may be more or fewer, at any offsets up to twice the length of a run.
template <class Visit>
inline int64_t read_offsets(const TopK& format, const uint8_t* chunk, const Place& at, int64_t numel, int64_t count,
                            const Visit& visit) {
    const int b = format.low_bits;
    const uint32_t low_mask = (1u << b) - 1;
    const int64_t bytes = upper_bytes(format, numel, count), spread = b ? 1 : 0;
    const uint8_t* upper = chunk + format.upper_at + at.upper;
    FieldReader low(chunk + format.low_at + at.low, width(format));
    int64_t entry = 0;
    for (int64_t i = 0; i < bytes; i += 8) {
        uint64_t word = 0;
        if (i + 8 <= bytes) std::memcpy(&word, upper + i, 8);
        else std::memcpy(&word, upper + i, size_t(bytes - i));
        for (; word; word &= word - 1, entry++) {
            if (entry >= count) continue;
            const int64_t row = 8 * i + __builtin_ctzll(word) - spread * entry;
            const uint32_t field = low.take();
            visit(entry, (row << b) | (field & low_mask), (field >> b & 1) << 31);
        }
    }
    return entry;
}

// Reads the entries of a run that has been checked.
inline void read_run(const TopK& format, const uint8_t* chunk, const Place& at, int64_t numel, int64_t count,
                     uint16_t* offsets, float* values) {
    const auto* scales = reinterpret_cast<const BFloat16*>(chunk + format.scales_at + at.scales);
    const auto* full = reinterpret_cast<const float*>(chunk + format.values_at) + at.entries;
    const auto* half = reinterpret_cast<const Half*>(chunk + format.values_at) + at.entries;
    read_offsets(format, chunk, at, numel, count, [&](int64_t entry, int64_t offset, uint32_t sign) {
        offsets[entry] = uint16_t(offset);
        values[entry] = float_of(sign);
    });
    switch (format.values) {
        case Values::fp32: std::memcpy(values, full, size_t(count) * sizeof(float)); break;
        case Values::fp16: for (int64_t i = 0; i < count; i++) values[i] = to_float(half[i]); break;
        case Values::sign:
            for (int64_t i = 0; i < count; i += kEntries) {  // branch-free, since signs are unpredictable
                const uint32_t scale = bits_of(to_float(scales[i / kEntries]));
                for (int64_t j = i; j < std::min(i + kEntries, count); j++) values[j] = float_of(scale ^ bits_of(values[j]));
            }
    }
}

// Where each run of each shard begins.
inline std::vector<Place> places(const TopK& format, const Layout& layout, const uint8_t* chunks) {
    const int64_t runs = ceil_div(layout.shard_numel, kRun);
    std::vector<Place> found(size_t(layout.shards * runs), Place{});
    for (int64_t s = 0; s < layout.shards; s++)
        for (int64_t r = 1; r < runs; r++) {
            Place& at = found[size_t(s * runs + r)] = found[size_t(s * runs + r - 1)];
            advance(format, run_numel(layout, r - 1), counts_in(chunks + s * format.chunk_bytes)[r - 1], at);
        }
    return found;
}

struct Candidate { uint32_t position; float value; };  // position within the shard

// The candidates that one thread finds in its part of a shard, and its share of the selection.
struct Finder {
    // In ascending order. Error and velocity already hold the values they have after sending, except for the error of signs,
    // whose magnitude is not known yet.
    std::unique_ptr<Candidate[]> candidates;
    std::unique_ptr<float[]> velocities;  // of the candidates, to be restored if they are not sent
    int64_t count = 0, room = 0;
    bool overflowed = false;           // more candidates than there is room for
    std::vector<uint32_t> not_finite;  // ascending, at most k + 1
    std::vector<uint32_t> histogram = std::vector<uint32_t>(2048);
    int64_t above = 0, equal = 0;      // how many exceed, how many equal the k-th largest magnitude

    void start(int64_t limit, bool has_velocity) {
        if (limit > room) {
            candidates.reset(new Candidate[size_t(limit)]);  // uninitialized, so that unused pages are never touched
            if (has_velocity) velocities.reset(new float[size_t(limit)]);
            room = limit;
        }
        count = 0;
        overflowed = false;
        not_finite.clear();
    }
};

template <class G>
class ShardEncoder {
public:
    ShardEncoder(const TopK& format, const Layout& layout, const void* const* gradients, FeedbackState state, uint8_t* chunks,
                 int threads)
        : format_(format), layout_(layout), gradients_(gradients), error_(state.error), velocity_(state.velocity),
          momentum_(state.momentum), chunks_(chunks), threads_(threads), barrier_(threads),
          finders_(size_t(threads)) {}

    // All threads call it, shard after shard.
    void encode(int t, int64_t shard) {
        if (t == 0) prepare(shard);
        barrier_.wait();
        Finder& mine = finders_[size_t(t)];
        collect(mine, begin(t), begin(t + 1));
        barrier_.wait();
        const bool finite = !any([](const Finder& f) { return !f.not_finite.empty(); });
        const bool guessed = found() >= need_ && !any([](const Finder& f) { return f.overflowed; });
        if (t == 0) {
            low_ = guessed ? threshold_ : 0;
            high_ = kMaxFinite + 1;
            remaining_ = need_;
        }
        barrier_.wait();  // every thread has read the other threads' results
        if (finite && guessed) {
            const int64_t count = mine.count;
            select(t, false, [&](const auto& visit) {
                for (int64_t c = 0; c < count; c++)
                    visit(mine.candidates[size_t(c)].position, mine.candidates[size_t(c)].value);
            });
        } else {
            restore_all(mine);
            if (finite) select(t, true, [&](const auto& visit) { each_value(begin(t), begin(t + 1), visit); });
            else if (t == 0) send_not_finite();
        }
        barrier_.wait();
    }

private:
    int64_t runs() const { return ceil_div(layout_.shard_numel, kRun); }
    int64_t first_run(int t) const { return runs() * t / threads_; }
    int64_t begin(int t) const {  // of a thread's part, in whole runs, so that no two threads write one byte
        return base_ + std::min(first_run(t) * kRun, layout_.shard_numel);
    }
    float value(int64_t tensor, int64_t element, int64_t position) const {
        if (!gradients_) return error_[position];
        float v = to_float(static_cast<const G*>(gradients_[tensor])[element]);
        if (velocity_) v = momentum_ * velocity_[position] + v;
        return v + (error_ ? error_[position] : 0.f);
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
        chunk_ = chunks_ + shard * format_.chunk_bytes;
        int64_t real = 0;
        for_range(layout_, base_, base_ + layout_.shard_numel,
                  [&](int64_t, int64_t, int64_t count, int64_t) { real += count; });
        need_ = std::min(format_.k, real);
        limit_ = std::max(need_, (need_ * 4 + kRun) / threads_ + kRun);
        threshold_ = guess_threshold(real);
    }

    // Estimates the magnitude that slightly more than k elements reach, from evenly spaced groups of 16 neighbours.
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

    // The dense pass, tile by tile: stores v in place of the error, and collects candidates while the tile is still in the
    // first-level cache.
    void collect(Finder& mine, int64_t from, int64_t to) {
        mine.start(limit_, velocity_ != nullptr);
        for_range(layout_, from, to, [&](int64_t tensor, int64_t first, int64_t count, int64_t position) {
            const G* g = gradients_ ? static_cast<const G*>(gradients_[tensor]) + first : nullptr;
            float* e = error_ ? error_ + position : nullptr;
            for (int64_t done = 0; done < count; done += kTile) {
                const int64_t size = std::min(kTile, count - done);
                const auto in_shard = uint32_t(position + done - base_);
                if (velocity_)
                    collect_tile<true, true, true>(mine, g + done, e + done, velocity_ + position + done, size, in_shard);
                else if (g && e) collect_tile<true, true, false>(mine, g + done, e + done, nullptr, size, in_shard);
                else if (g) collect_tile<true, false, false>(mine, g + done, nullptr, nullptr, size, in_shard);
                else collect_tile<false, true, false>(mine, nullptr, e + done, nullptr, size, in_shard);
            }
        });
    }

    template <bool HasGradient, bool HasError, bool HasVelocity>
    void collect_tile(Finder& mine, const G* g, float* e, float* u, int64_t count, uint32_t in_shard) {
        const F8 zero = splat(0), momentum = splat(momentum_);
        uint16_t found[kTile + 4];
        int64_t n = 0, i = 0;
        for (; i + 64 <= count; i += 64) {
            for (int64_t ahead = i + kAhead; ahead < i + kAhead + 64; ahead += 16) {
                if (HasGradient) prefetch(g + ahead);
                if (HasError) prefetch(e + ahead);
                if (HasVelocity) prefetch(u + ahead);
            }
            F8 v[8], w[8], largest = zero;
            for (int q = 0; q < 8; q++) {
                if (HasGradient) v[q] = load(g + i + 8 * q);
                if (HasVelocity) v[q] = w[q] = add(mul(momentum, load(u + i + 8 * q)), v[q]);
                if (HasGradient) v[q] = add(v[q], HasError ? load(e + i + 8 * q) : zero);
                else v[q] = load(e + i + 8 * q);
                largest = larger_magnitude(largest, v[q]);
            }
            uint64_t hits;
            if (__builtin_expect(at_least(largest, kMaxFinite + 1), 0)) {
                hits = take_singly<HasGradient, HasError, HasVelocity>(mine, g, e, u, i, i + 64, in_shard);
            } else {
                uint32_t half[2] = {0, 0};
                for (int q = 0; q < 8; q++) {
                    half[q / 4] |= at_least(v[q], threshold_) << (8 * q % 32);
                    if (HasGradient && HasError) store(e + i + 8 * q, v[q]);
                    if (HasVelocity) store(u + i + 8 * q, w[q]);
                }
                hits = half[0] | uint64_t(half[1]) << 32;
            }
            n = add_places(hits, i, found, n);
        }
        if (i < count)
            n = add_places(take_singly<HasGradient, HasError, HasVelocity>(mine, g, e, u, i, count, in_shard), i, found, n);

        if (mine.count + n > limit_) mine.overflowed = true;
        if (mine.overflowed) return;
        Candidate* next = mine.candidates.get() + mine.count;
        for (int64_t c = 0; c < n; c++) {
            const float v = HasError ? e[found[c]] : to_float(g[found[c]]) + 0.f;
            next[c] = {in_shard + found[c], v};
            if (HasError && format_.values != Values::sign) e[found[c]] = left_over(v);
            if (HasVelocity) {
                mine.velocities[size_t(mine.count + c)] = u[found[c]];
                u[found[c]] = 0.f;
            }
        }
        mine.count += n;
    }

    // Appends the positions of the set bits, always in groups of four: faster than a branch on their number.
    static int64_t add_places(uint64_t bits, int64_t first, uint16_t* places, int64_t n) {
        const int64_t end = n + __builtin_popcountll(bits);
        do
            for (int j = 0; j < 4; j++, bits &= bits - 1)
                places[n + j] = uint16_t(first + __builtin_ctzll(bits | uint64_t(1) << 63));
        while ((n += 4) < end);
        return end;
    }

    // Handles up to 64 values one by one. Those that are not finite are recorded, and their error stays as it was.
    template <bool HasGradient, bool HasError, bool HasVelocity>
    uint64_t take_singly(Finder& mine, const G* g, float* e, float* u, int64_t from, int64_t to, uint32_t in_shard) {
        uint64_t hits = 0;
        for (int64_t j = from; j < to; j++) {
            float w = HasGradient ? to_float(g[j]) : 0.f;
            if (HasVelocity) w = momentum_ * u[j] + w;
            const float v = HasGradient ? w + (HasError ? e[j] : 0.f) : e[j];
            if (magnitude(v) > kMaxFinite) {
                // More than k + 1 of them make no difference.
                if (int64_t(mine.not_finite.size()) <= format_.k) mine.not_finite.push_back(in_shard + uint32_t(j));
                continue;
            }
            if (HasGradient && HasError) e[j] = v;
            if (HasVelocity) u[j] = w;
            hits |= uint64_t(magnitude(v) >= threshold_) << (j - from);
        }
        return hits;
    }

    // The error once v is sent, unless as a sign.
    float left_over(float v) const { return format_.values == Values::fp16 ? v - to_float(half_of(v)) : 0.f; }

    // A shard with non-finite values sends those alone; its finite values remain in the error. If there are more than k of
    // them, the whole shard is sent as NaN.
    void send_not_finite() {
        std::vector<Candidate> entries;
        for (const Finder& f : finders_)
            for (uint32_t position : f.not_finite) entries.push_back({position, float_of(kNaN)});
        const bool all = int64_t(entries.size()) > format_.k;
        if (all) entries.assign(1, {0, float_of(kNaN)});
        write_runs(0, runs(), Place{}, entries.data(), entries.data() + entries.size(), [](const Candidate&, float) {});
        if (all) counts_in(chunk_)[0] = kAllNotFinite;
    }

    // Restores error and velocity of all candidates.
    void restore_all(Finder& mine) {
        for (int64_t c = 0; c < mine.count; c++) restore(mine, c);
        mine.count = 0;
    }
    void restore(const Finder& mine, int64_t c) {
        const int64_t position = base_ + mine.candidates[size_t(c)].position;
        if (error_) error_[position] = mine.candidates[size_t(c)].value;
        if (velocity_) velocity_[position] = mine.velocities[size_t(c)];
    }

    // Writes the entries of some runs, in ascending order, and calls on_entry(entry, value that readers will see) for each.
    template <class OnEntry>
    void write_runs(int64_t run, int64_t last_run, Place at, const Candidate* entry, const Candidate* end,
                    const OnEntry& on_entry) {
        for (; run < last_run; run++) {
            const Candidate* next = entry;
            while (next < end && next->position < (run + 1) * kRun) next++;
            counts_in(chunk_)[run] = uint32_t(next - entry);
            write_run(at, run_numel(layout_, run), entry, next - entry, on_entry);
            advance(format_, run_numel(layout_, run), next - entry, at);
            entry = next;
        }
    }

    template <class OnEntry>
    void write_run(const Place& at, int64_t run_numel, const Candidate* entry, int64_t count, const OnEntry& on_entry) {
        const int b = format_.low_bits, bits = width(format_);
        uint8_t* upper = chunk_ + format_.upper_at + at.upper;
        FieldWriter low(chunk_ + format_.low_at + at.low, bits);
        uint64_t word = 0;  // of the upper bits, from byte 8 * words on
        int64_t words = 0;
        auto* scales = reinterpret_cast<BFloat16*>(chunk_ + format_.scales_at + at.scales);
        auto* full = reinterpret_cast<float*>(chunk_ + format_.values_at) + at.entries;
        auto* half = reinterpret_cast<Half*>(chunk_ + format_.values_at) + at.entries;
        float scale = 0.f;
        for (int64_t i = 0; i < count; i++) {
            const uint32_t offset = entry[i].position % kRun;
            const float v = entry[i].value;
            const int64_t bit = (offset >> b) + (b ? i : 0);
            if (bit / 64 != words) {
                std::memcpy(upper + 8 * words, &word, 8);
                words = bit / 64;
                word = 0;
            }
            word |= uint64_t(1) << bit % 64;
            float arrives = v;
            if (format_.values == Values::sign) {
                if (i % kEntries == 0) {
                    from_float(mean_magnitude(entry + i, std::min(kEntries, count - i)), scales + i / kEntries);
                    scale = to_float(scales[i / kEntries]);
                }
                arrives = float_of(bits_of(scale) | (bits_of(v) & kSignBit));
            } else if (format_.values == Values::fp16) {
                half[i] = half_of(v);
                arrives = to_float(half[i]);
            } else {
                full[i] = v;
            }
            if (bits) low.put((offset & ((1u << b) - 1)) | (bits > b ? bits_of(v) >> 31 << b : 0));
            on_entry(entry[i], arrives);
        }
        if (!count) return;
        low.finish();
        std::memcpy(upper + 8 * words, &word, size_t(std::min<int64_t>(8, upper_bytes(format_, run_numel, count) - 8 * words)));
    }

    // Of up to kEntries entries, the largest bfloat16 at most.
    static float mean_magnitude(const Candidate* entry, int64_t count) {
        float terms[kEntries] = {};
        for (int64_t i = 0; i < count; i++) terms[i] = float_of(magnitude(entry[i].value));
        RowSum sum;
        for (int64_t i = 0; i < kEntries; i += kRow)
            for (int q = 0; q < 4; q++) sum.group[q] = add(sum.group[q], load(terms + i + 8 * q));
        const float mean = sum.finish() / float(count), largest = float_of(0x7f7f0000u);
        return mean > largest ? largest : mean;
    }

    // Calls visit(position in the shard, value) for all values, which the error holds by now, if there is one.
    template <class Visit> void each_value(int64_t from, int64_t to, const Visit& visit) const {
        for_range(layout_, from, to, [&](int64_t tensor, int64_t first, int64_t count, int64_t position) {
            for (int64_t j = 0; j < count; j++)
                visit(uint32_t(position + j - base_), error_ ? error_[position + j] : value(tensor, first + j, position + j));
        });
    }

    // Finds the need_-th largest magnitude by narrowing the interval low_ .. high_ that contains it, at most 2048 bins at a
    // time, and sends the entries in ascending order. values(visit) iterates over this thread's part, in order. If `in_error`,
    // the error holds the values, otherwise what remains of them after sending.
    template <class EachValue> void select(int t, bool in_error, const EachValue& values) {
        Finder& mine = finders_[size_t(t)];
        mine.above = 0;
        for (bool first = true; high_ - low_ > 1; first = false) {
            std::fill(mine.histogram.begin(), mine.histogram.end(), 0);
            // The first bins cover one octave, in which most candidates lie. Everything above it shares the last bin.
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
        // Entries sent before this thread's part, and ties that remain. Zeros are not sent: a sign would not preserve them.
        int64_t entry = 0, ties = least ? remaining_ : 0;
        for (int other = 0; other < t; other++) {
            const Finder& f = finders_[size_t(other)];
            const int64_t given = std::min(f.equal, ties);
            entry += f.above + given;
            ties -= given;
        }
        // The entries to be sent overwrite the candidates from which they are chosen.
        const int64_t most = need_ - entry;
        int64_t sent = 0, seen = 0;
        values([&](uint32_t position, float v) {
            const uint32_t m = magnitude(v);
            if ((m > least || (m == least && ties-- > 0)) && sent < most) mine.candidates[size_t(sent++)] = {position, v};
            else if (!in_error) restore(mine, seen);
            seen++;
        });
        const Candidate *begin = mine.candidates.get(), *end = begin + sent;
        uint32_t* counts = counts_in(chunk_);  // of this thread's runs: no other thread writes them
        std::fill(counts + first_run(t), counts + first_run(t + 1), 0u);
        for (const Candidate* c = begin; c < end; c++) counts[c->position / kRun]++;
        barrier_.wait();  // each thread needs to know where its runs begin
        Place at;
        for (int64_t run = 0; run < first_run(t); run++) advance(format_, run_numel(layout_, run), counts[run], at);
        const bool write_error = error_ && (in_error || format_.values == Values::sign);
        const bool clear_velocity = velocity_ && in_error;
        write_runs(first_run(t), first_run(t + 1), at, begin, end, [&](const Candidate& c, float arrives) {
            if (write_error) {
                if (end - &c > kAheadOfEntries) prefetch(error_ + base_ + (&c + kAheadOfEntries)->position);
                error_[base_ + c.position] = c.value - arrives;
            }
            if (clear_velocity) velocity_[base_ + c.position] = 0.f;
        });
    }

    const TopK& format_;
    const Layout& layout_;
    const void* const* gradients_;
    float *error_, *velocity_;
    const float momentum_;
    uint8_t* chunks_;
    const int threads_;
    Barrier barrier_;
    std::vector<Finder> finders_;
    std::vector<uint32_t> sample_;
    // of the current shard
    int64_t base_ = 0, need_ = 0, limit_ = 0, remaining_ = 0;
    uint8_t* chunk_ = nullptr;
    uint32_t threshold_ = 0, low_ = 0, high_ = 0, bin_ = 0;
};

void top_k_encode(const TopK& format, const Layout& layout, Tensors gradients, FeedbackState state, uint8_t* chunks,
                  int threads) {
    const void* const* data = gradients.dtype == Dtype::none ? nullptr : gradients.data;
    with_element_type(gradients.dtype, [&](auto* type) {
        ShardEncoder<std::remove_pointer_t<decltype(type)>> encoder(format, layout, data, state, chunks, threads);
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
void scatter(const TopK& format, const Layout& layout, const uint8_t* chunks, void* const* gradients, int threads) {
    const int64_t runs = ceil_div(layout.shard_numel, kRun), total = layout.shards * runs;
    const std::vector<Place> begins = places(format, layout, chunks);
    const bool large = layout.shards * layout.shard_numel * int64_t(sizeof(G)) >= kLarge;
    parallel(threads, [&](int t) {
        std::vector<G> tile(size_t(kTile), G{});  // zeros, except for the current entries
        std::vector<uint16_t> offsets(size_t(std::min(format.k, kRun)));
        std::vector<float> values(offsets.size());
        for (int64_t at = total * t / threads; at < total * (t + 1) / threads; at++) {
            const int64_t shard = at / runs, run = at % runs;
            const int64_t begin = shard * layout.shard_numel + run * kRun, end = begin + run_numel(layout, run);
            const uint8_t* chunk = chunks + shard * format.chunk_bytes;
            if (counts_in(chunk)[0] == kAllNotFinite) {
                for_range(layout, begin, end, [&](int64_t tensor, int64_t first, int64_t count, int64_t) {
                    G* to = static_cast<G*>(gradients[tensor]) + first;
                    for (int64_t i = 0; i < count; i++) from_float(float_of(kNaN), to + i);
                });
                continue;
            }
            const int64_t last = counts_in(chunk)[run];
            read_run(format, chunk, begins[size_t(at)], end - begin, last, offsets.data(), values.data());
            int64_t entry = 0;
            for_range(layout, begin, end, [&](int64_t tensor, int64_t first, int64_t count, int64_t position) {
                G* to = static_cast<G*>(gradients[tensor]) + first;
                for (int64_t done = 0; done < count; done += kTile) {
                    const int64_t size = std::min(kTile, count - done), from = entry;
                    auto inside = [&](int64_t i) { return begin + offsets[size_t(i)] - position - done; };
                    for (; entry < last && inside(entry) < size; entry++)
                        from_float(values[size_t(entry)], &tile[size_t(inside(entry))]);
                    copy_out(to + done, tile.data(), size, large);
                    for (int64_t i = from; i < entry; i++) from_float(0.f, &tile[size_t(inside(i))]);
                }
            });
        }
        stream_end();
    });
}

void top_k_decode(const TopK& format, const Layout& layout, const uint8_t* chunks, Tensors gradients, int threads) {
    with_element_type(gradients.dtype, [&](auto* type) {
        scatter<std::remove_pointer_t<decltype(type)>>(format, layout, chunks, gradients.data, threads);
    });
}

void top_k_accumulate(const TopK& format, const Layout& layout, const uint8_t* chunk, float weight, float* sum, int threads) {
    if (counts_in(chunk)[0] == kAllNotFinite)
        return for_range(layout, 0, layout.shard_numel, [&](int64_t, int64_t, int64_t count, int64_t position) {
            std::fill(sum + position, sum + position + count, float_of(kNaN));
        });
    const std::vector<Place> begins = places(format, layout, chunk);
    parallel(threads, [&](int t) {
        std::vector<uint16_t> offsets(size_t(std::min(format.k, kRun)));
        std::vector<float> values(offsets.size());
        const auto runs = int64_t(begins.size());
        for (int64_t run = runs * t / threads; run < runs * (t + 1) / threads; run++) {
            const int64_t count = counts_in(chunk)[run];
            read_run(format, chunk, begins[size_t(run)], run_numel(layout, run), count, offsets.data(), values.data());
            for (int64_t i = 0; i < count; i++) {
                if (i + kAheadOfEntries < count) prefetch(sum + run * kRun + offsets[size_t(i + kAheadOfEntries)]);
                sum[run * kRun + offsets[size_t(i)]] += values[size_t(i)] * weight;
            }
        }
    });
}

// Where the values of a chunk begin, and how many there can be: each run begins a new magnitude.
inline int64_t begin_of_values(const TopK& format) {
    return format.values == Values::sign ? format.scales_at : format.values_at;
}
inline int64_t most_values(const TopK& format, const Layout& layout) {
    return format.values == Values::sign ? ceil_div(format.k, kEntries) + ceil_div(layout.shard_numel, kRun) : format.k;
}

// Calls call(type), where type is a null pointer to the type of the values, or magnitudes, in a chunk.
template <class Call> auto with_value_type(const TopK& format, const Call& call) {
    switch (format.values) {
        case Values::fp32: return call(static_cast<const float*>(nullptr));
        case Values::fp16: return call(static_cast<const Half*>(nullptr));
        default: return call(static_cast<const BFloat16*>(nullptr));
    }
}

bool top_k_is_within(const TopK& format, const Layout& layout, const uint8_t* chunks, int64_t count, float limit) {
    return with_value_type(format, [&](auto* type) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        return all_within<T>(chunks, count, format.chunk_bytes, begin_of_values(format), most_values(format, layout), limit);
    });
}

constexpr decltype(Passes<TopK>::serve) top_k_serve = nullptr;

const char* top_k_fault(const TopK& format, const Layout& layout, const uint8_t* chunks) {
    for (int64_t shard = 0; shard < layout.shards; shard++) {
        const uint8_t* chunk = chunks + shard * format.chunk_bytes;
        if (layout.shard_numel && counts_in(chunk)[0] == kAllNotFinite) {
            const float value = with_value_type(format, [&](auto* type) {
                return to_float(*reinterpret_cast<decltype(type)>(chunk + begin_of_values(format)));
            });
            if (std::isnan(value)) continue;
        }
        Place at;
        int64_t tensor = 0;
        for (int64_t run = 0; run * kRun < layout.shard_numel; run++) {
            const int64_t count = counts_in(chunk)[run], begin = run * kRun, numel = run_numel(layout, run);
            if (count > format.k - at.entries) return "counts exceed k";
            const char* fault = nullptr;
            int64_t previous = -1;
            const int64_t found = read_offsets(format, chunk, at, numel, count, [&](int64_t, int64_t offset, uint32_t) {
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
            advance(format, numel, count, at);
        }
    }
    return nullptr;
}

}  // namespace
