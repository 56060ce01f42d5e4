// Random numbers of a counter, as csrc/shared/philox.h says. Included by kernels that draw them.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "../shared/philox.h"

namespace {

// The eight numbers of a row over 2**16, in [0, 1).
inline void uniforms(const Philox& random, uint64_t row, float out[8]) {
    uint32_t x[4];
    random_words<OneWord>(random, uint32_t(row), x);
    for (int j = 0; j < 8; j++) out[j] = float(x[j / 2] >> (16 * (j % 2)) & 0xffffu) * 0x1p-16f;
}

// Of eight rows from first_row on: all their words, and out[r] for the numbers of row first_row + r.
#ifdef DS_AVX2

struct EightWords {
    using Word = __m256i;

    static __m256i splat(uint32_t x) { return _mm256_set1_epi32(int(x)); }
    static void multiply(uint32_t a, __m256i b, __m256i& high, __m256i& low) {
        const __m256i m = splat(a), even = _mm256_mul_epu32(b, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(b, 32), m);
        high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
        low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    }
    static __m256i mix(__m256i a, __m256i b, uint32_t key) {
        return _mm256_xor_si256(_mm256_xor_si256(a, b), splat(key));
    }
};

inline F8 uniform(__m128i numbers) {
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(numbers)), splat(0x1p-16f));
}

inline void random_rows(const Philox& random, uint64_t first_row, __m128i out[8]) {
    __m256i x[4];
    random_words<EightWords>(
        random, _mm256_add_epi32(EightWords::splat(uint32_t(first_row)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), x);
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

inline void random_rows(const Philox& random, uint64_t first_row, uint32_t out[8][4]) {
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

inline void random_rows(const Philox& random, uint64_t first_row, uint32_t out[8][4]) {
    for (int r = 0; r < 8; r++) random_words<OneWord>(random, uint32_t(first_row + uint64_t(r)), out[r]);
}

inline void uniforms(const Philox& random, uint64_t first_row, F8 out[8]) {
    for (int r = 0; r < 8; r++) uniforms(random, first_row + uint64_t(r), out[r].x);
}

#endif

// Of any number of rows, for tests.
void uniforms_of_rows(const uint32_t key[2], const uint32_t counter[3], uint64_t first_row, int64_t rows, float* out) {
    const Philox random = {{key[0], key[1]}, {counter[0], counter[1], counter[2]}};
    for (; rows >= 8; rows -= 8, first_row += 8) {
        F8 eight[8];
        uniforms(random, first_row, eight);
        for (int r = 0; r < 8; r++, out += 8) store(out, eight[r]);
    }
    for (; rows > 0; rows--, first_row++, out += 8) uniforms(random, first_row, out);
}

}  // namespace
