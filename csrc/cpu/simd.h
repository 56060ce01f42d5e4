// Eight floats at a time, written once for two instruction sets.
//
// A translation unit that defines DS_AVX2 gets AVX2 + F16C, any other gets plain C++. The kernels are written against
// these few functions only, so both paths round in the same places and give the same bits. There is no fused
// multiply-add here: the torch reference could not follow it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef DS_AVX2
#include <immintrin.h>
#endif

namespace {  // each translation unit owns its copy: an AVX2 body must never be linked into the portable path

inline uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float float_of(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }
inline int leading_zeros(uint32_t x) { return __builtin_clz(x); }

}  // namespace

#define DS_FUNCTION inline
#include "../shared/half.h"

namespace {

// ---- one element

inline uint32_t magnitude(float x) { return bits_of(x) & ~kSignBit; }
// The magnitude or, where that is less, the limit, with the sign; not of NaN.
inline float limited(float x, float limit) {
    return float_of(std::min(magnitude(x), bits_of(limit)) | (bits_of(x) & kSignBit));
}

// ---- eight elements

#ifdef DS_AVX2

using F8 = __m256;
inline F8 load(const float* p) { return _mm256_loadu_ps(p); }
inline F8 load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline F8 load(const BFloat16* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline void store(float* p, F8 x) { _mm256_storeu_ps(p, x); }
inline void store(Half* p, F8 x) {  // what is finite stays so
    const F8 m = _mm256_andnot_ps(_mm256_set1_ps(-0.f), x), largest = _mm256_set1_ps(65504.f);
    const F8 over = _mm256_and_ps(_mm256_cmp_ps(m, largest, _CMP_GT_OQ),
                                  _mm256_cmp_ps(m, _mm256_set1_ps(float_of(kMaxFinite)), _CMP_LE_OQ));
    x = _mm256_blendv_ps(x, _mm256_or_ps(largest, _mm256_and_ps(_mm256_set1_ps(-0.f), x)), over);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* p, F8 x) {
    const __m256i u = _mm256_castps_si256(x), lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff))), 16);
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}
inline F8 splat(float x) { return _mm256_set1_ps(x); }
inline F8 add(F8 a, F8 b) { return _mm256_add_ps(a, b); }
inline F8 sub(F8 a, F8 b) { return _mm256_sub_ps(a, b); }
inline F8 mul(F8 a, F8 b) { return _mm256_mul_ps(a, b); }
inline F8 abs(F8 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
inline F8 with_sign_of(F8 positive, F8 a) { return _mm256_or_ps(positive, _mm256_and_ps(_mm256_set1_ps(-0.f), a)); }
// bit j of the result: the sign of lane j
inline uint32_t signs(F8 a) { return uint32_t(_mm256_movemask_ps(a)); }
// x four times, negated where the 32 sign bits at p say so
inline void negate_where(const uint8_t* p, F8 x, F8 out[4]) {
    int32_t word;
    std::memcpy(&word, p, 4);
    const __m256i up = _mm256_sllv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0));
    const __m256i sign = _mm256_set1_epi32(int(kSignBit)), bits = _mm256_castps_si256(x);
    auto negate = [&](__m256i s) { return _mm256_castsi256_ps(_mm256_xor_si256(bits, _mm256_and_si256(s, sign))); };
    out[0] = negate(_mm256_slli_epi32(up, 24));
    out[1] = negate(_mm256_slli_epi32(up, 16));
    out[2] = negate(_mm256_slli_epi32(up, 8));
    out[3] = negate(up);
}
// bit j of the result: |lane j|, as an integer, is at least key. So NaN is the largest magnitude of all.
inline uint32_t at_least(F8 a, uint32_t key) {
    const __m256i m = _mm256_castps_si256(abs(a));
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(m, _mm256_set1_epi32(int(key) - 1)))));
}
// lane by lane, what has the larger magnitude in the order of at_least; its sign is lost
inline F8 larger_magnitude(F8 magnitudes, F8 a) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(magnitudes), _mm256_castps_si256(abs(a))));
}
// lane by lane, the whole part of a value that is not negative, or the limit where that is less
inline F8 truncated(F8 a, F8 limit) {
    return _mm256_round_ps(_mm256_min_ps(a, limit), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
}
// lane by lane, a where b is zero, else zero
inline F8 where_zero(F8 a, F8 b) { return _mm256_and_ps(a, _mm256_cmp_ps(b, _mm256_setzero_ps(), _CMP_EQ_OQ)); }
// Whole numbers from -levels to levels, to which levels are added, in bytes, or in `Bits` bits from bit `Shift` of a byte on.
// 2**23 + x has the bits of 2**23 plus x.
template <int Shift, int Bits> inline F8 from_codes(const uint8_t* p, F8 levels) {
    const F8 one_at = _mm256_set1_ps(float(1 << (23 - Shift)));
    __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    if (Bits < 8) x = _mm256_and_si256(x, _mm256_set1_epi32(((1 << Bits) - 1) << Shift));
    return _mm256_sub_ps(_mm256_or_ps(_mm256_castsi256_ps(x), one_at), _mm256_add_ps(one_at, levels));
}
inline void to_codes(const F8 a[4], F8 levels, uint8_t* p) {
    __m256i x[4];
    for (int q = 0; q < 4; q++) {
        const F8 sum = _mm256_add_ps(a[q], _mm256_add_ps(_mm256_set1_ps(0x1p23f), levels));
        x[q] = _mm256_and_si256(_mm256_castps_si256(sum), _mm256_set1_epi32(255));
    }
    // Packing interleaves the halves of its operands: groups of four numbers are put in order again.
    const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(x[0], x[1]), _mm256_packus_epi32(x[2], x[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
// lane by lane, the magnitude or, where that is less, the limit, with the sign; not of NaN
inline F8 limited(F8 a, float limit) {
    const __m256i m = _mm256_min_epi32(_mm256_castps_si256(abs(a)), _mm256_set1_epi32(int(bits_of(limit))));
    return with_sign_of(_mm256_castsi256_ps(m), a);
}
// past the caches: for a large array that is written and not read soon; p must be 32-byte aligned
inline void stream(float* p, F8 x) { _mm256_stream_ps(p, x); }
inline void stream_end() { _mm_sfence(); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

#else

struct F8 { float x[8]; };
template <class Op> inline F8 lanes(Op op) { F8 r; for (int j = 0; j < 8; j++) r.x[j] = op(j); return r; }
template <class T> inline F8 load(const T* p) { return lanes([&](int j) { return to_float(p[j]); }); }
template <class T> inline void store(T* p, F8 a) { for (int j = 0; j < 8; j++) from_float(a.x[j], p + j); }
inline F8 splat(float x) { return lanes([&](int) { return x; }); }
inline F8 add(F8 a, F8 b) { return lanes([&](int j) { return a.x[j] + b.x[j]; }); }
inline F8 sub(F8 a, F8 b) { return lanes([&](int j) { return a.x[j] - b.x[j]; }); }
inline F8 mul(F8 a, F8 b) { return lanes([&](int j) { return a.x[j] * b.x[j]; }); }
inline F8 abs(F8 a) { return lanes([&](int j) { return float_of(magnitude(a.x[j])); }); }
inline F8 with_sign_of(F8 positive, F8 a) {
    return lanes([&](int j) { return float_of(bits_of(positive.x[j]) | (bits_of(a.x[j]) & kSignBit)); });
}
inline uint32_t signs(F8 a) {
    uint32_t m = 0;
    for (int j = 0; j < 8; j++) m |= (bits_of(a.x[j]) >> 31) << j;
    return m;
}
inline void negate_where(const uint8_t* p, F8 x, F8 out[4]) {
    for (int q = 0; q < 4; q++)
        out[q] = lanes([&](int j) { return float_of(bits_of(x.x[j]) ^ ((p[q] >> j & 1u) << 31)); });
}
inline uint32_t at_least(F8 a, uint32_t key) {
    uint32_t m = 0;
    for (int j = 0; j < 8; j++) m |= uint32_t(magnitude(a.x[j]) >= key) << j;
    return m;
}
inline F8 larger_magnitude(F8 magnitudes, F8 a) {
    return lanes([&](int j) { return float_of(std::max(bits_of(magnitudes.x[j]), magnitude(a.x[j]))); });
}
inline F8 truncated(F8 a, F8 limit) { return lanes([&](int j) { return float(int(std::min(a.x[j], limit.x[j]))); }); }
inline F8 where_zero(F8 a, F8 b) { return lanes([&](int j) { return b.x[j] == 0.f ? a.x[j] : 0.f; }); }
template <int Shift, int Bits> inline F8 from_codes(const uint8_t* p, F8 levels) {
    return lanes([&](int j) { return float(p[j] >> Shift & ((1 << Bits) - 1)) - levels.x[j]; });
}
inline void to_codes(const F8 a[4], F8 levels, uint8_t* p) {
    for (int j = 0; j < 32; j++) p[j] = uint8_t(a[j / 8].x[j % 8] + levels.x[j % 8]);
}
inline F8 limited(F8 a, float limit) { return lanes([&](int j) { return limited(a.x[j], limit); }); }
inline void stream(float* p, F8 x) { store(p, x); }
inline void stream_end() {}
inline void prefetch(const void* p) { __builtin_prefetch(p); }

#endif

// The first few of eight values.
template <class G> inline void put(G* to, F8 values, int valid) {
    if (valid == 8) return store(to, values);
    float v[8];
    store(v, values);
    for (int j = 0; j < valid; j++) from_float(v[j], to + j);
}

// Adds the first few of eight values.
inline void add_to(float* to, F8 values, int valid) {
    if (valid == 8) return store(to, add(load(to), values));
    float v[8];
    store(v, values);
    for (int j = 0; j < valid; j++) to[j] += v[j];
}

}  // namespace
