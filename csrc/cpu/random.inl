// Random numbers of a counter: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011). Included by kernels that draw them.
//
// Row r of a pass is the counter (r, step, bucket, sender), whose four words are eight numbers of 16 bits, the low half of
// a word first: they belong to the elements 8r .. 8r+7. So an element draws the same one whoever works on it.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

constexpr uint32_t kMultiplier[2] = {0xd2511f53u, 0xcd9e8d57u}, kWeyl[2] = {0x9e3779b9u, 0xbb67ae85u};
constexpr int kRounds = 10;

// The four words of one counter.
inline void random_words(const Philox& random, uint32_t row, uint32_t x[4]) {
    uint32_t key[2] = {random.key[0], random.key[1]};
    x[0] = row;
    for (int i = 0; i < 3; i++) x[i + 1] = random.counter[i];
    for (int round = 0; round < kRounds; round++) {
        const uint64_t a = uint64_t(kMultiplier[0]) * x[0], b = uint64_t(kMultiplier[1]) * x[2];
        x[0] = uint32_t(b >> 32) ^ x[1] ^ key[0];
        x[2] = uint32_t(a >> 32) ^ x[3] ^ key[1];
        x[1] = uint32_t(b);
        x[3] = uint32_t(a);
        for (int i = 0; i < 2; i++) key[i] += kWeyl[i];
    }
}

// The eight numbers of a row over 2**16, in [0, 1).
inline void uniforms(const Philox& random, uint64_t row, float out[8]) {
    uint32_t x[4];
    random_words(random, uint32_t(row), x);
    for (int j = 0; j < 8; j++) out[j] = float(x[j / 2] >> (16 * (j % 2)) & 0xffffu) * 0x1p-16f;
}

// Of eight rows from first_row on: all their words, and out[r] for the numbers of row first_row + r.
#ifdef DS_AVX2

inline __m256i words(uint32_t x) { return _mm256_set1_epi32(int(x)); }

// High and low words of eight products.
inline void multiply(uint32_t multiplier, __m256i x, __m256i& high, __m256i& low) {
    const __m256i m = words(multiplier), even = _mm256_mul_epu32(x, m);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), m);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}

inline F8 uniform(__m128i numbers) {
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(numbers)), splat(0x1p-16f));
}

inline void random_rows(const Philox& random, uint64_t first_row, __m128i out[8]) {
    uint32_t key[2] = {random.key[0], random.key[1]};
    __m256i x[4] = {_mm256_add_epi32(words(uint32_t(first_row)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
                    words(random.counter[0]), words(random.counter[1]), words(random.counter[2])};
    for (int round = 0; round < kRounds; round++) {
        __m256i high[2], low[2];
        for (int i = 0; i < 2; i++) multiply(kMultiplier[i], x[2 * i], high[i], low[i]);
        x[0] = _mm256_xor_si256(_mm256_xor_si256(high[1], x[1]), words(key[0]));
        x[2] = _mm256_xor_si256(_mm256_xor_si256(high[0], x[3]), words(key[1]));
        x[1] = low[1];
        x[3] = low[0];
        for (int i = 0; i < 2; i++) key[i] += kWeyl[i];
    }
    // The words of a row side by side: rows r and r + 4 in the halves of rows[r].
    const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpacklo_epi32(x[2], x[3]);
    const __m256i c = _mm256_unpackhi_epi32(x[0], x[1]), d = _mm256_unpackhi_epi32(x[2], x[3]);
    const __m256i rows[4] = {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b),
                             _mm256_unpacklo_epi64(c, d), _mm256_unpackhi_epi64(c, d)};
    for (int r = 0; r < 4; r++) {
        out[r] = _mm256_castsi256_si128(rows[r]);
        out[r + 4] = _mm256_extracti128_si256(rows[r], 1);
    }
}

inline void random_words(const Philox& random, uint64_t first_row, uint32_t out[8][4]) {
    __m128i rows[8];
    random_rows(random, first_row, rows);
    for (int r = 0; r < 8; r++) _mm_storeu_si128(reinterpret_cast<__m128i*>(out[r]), rows[r]);
}

inline void uniforms(const Philox& random, uint64_t first_row, F8 out[8]) {
    __m128i rows[8];
    random_rows(random, first_row, rows);
    for (int r = 0; r < 8; r++) out[r] = uniform(rows[r]);
}

#else

inline void random_words(const Philox& random, uint64_t first_row, uint32_t out[8][4]) {
    for (int r = 0; r < 8; r++) random_words(random, uint32_t(first_row + uint64_t(r)), out[r]);
}

inline void uniforms(const Philox& random, uint64_t first_row, F8 out[8]) {
    for (int r = 0; r < 8; r++) uniforms(random, first_row + uint64_t(r), out[r].x);
}

#endif

// Of any number of rows, for those that test it.
void uniforms_of_rows(const Philox& random, uint64_t first_row, int64_t rows, float* out) {
    for (; rows >= 8; rows -= 8, first_row += 8) {
        F8 eight[8];
        uniforms(random, first_row, eight);
        for (int r = 0; r < 8; r++, out += 8) store(out, eight[r]);
    }
    for (; rows > 0; rows--, first_row++, out += 8) uniforms(random, first_row, out);
}

}  // namespace
