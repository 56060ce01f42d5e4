// Conversions between float32 and 16-bit floats, for CPU and CUDA alike.
//
// They work on bits, so that flushing denormals cannot reach inside them. This file includes nothing: NVRTC has no headers.
// csrc/cpu/simd.h defines DS_FUNCTION and the three functions below before it includes this file; CUDA sources begin with it.
#ifndef DS_SHARED_HALF
#define DS_SHARED_HALF

#ifndef DS_FUNCTION
#define DS_FUNCTION __device__ inline
#define DS_CUDA
DS_FUNCTION unsigned bits_of(float x) { return __float_as_uint(x); }
DS_FUNCTION float float_of(unsigned u) { return __uint_as_float(u); }
DS_FUNCTION int leading_zeros(unsigned x) { return __clz(int(x)); }
#endif

namespace {  // each translation unit for a CPU owns its copy

struct Half { unsigned short bits; };
struct BFloat16 { unsigned short bits; };

constexpr unsigned kSignBit = 0x80000000u;
constexpr unsigned kMaxFinite = 0x7f7fffffu;
constexpr unsigned kNaN = 0x7fc00000u;  // the one NaN that travels: bit patterns must not depend on the processor

DS_FUNCTION float to_float(float x) { return x; }
DS_FUNCTION float to_float(BFloat16 x) { return float_of(unsigned(x.bits) << 16); }
DS_FUNCTION float to_float(Half x) {
    const unsigned sign = unsigned(x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 0x3ffu;
    if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction ? 0x400000u | fraction << 13 : 0));
    if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    if (!fraction) return float_of(sign);
    const int shift = leading_zeros(fraction) - 21;  // a half denormal is a normal float
    return float_of(sign | unsigned(113 - shift) << 23 | ((fraction << (shift + 13)) & 0x7fffffu));
}

// Rounds to nearest even. What is finite stays finite in float16.
DS_FUNCTION void from_float(float x, float* out) { *out = x; }
DS_FUNCTION void from_float(float x, BFloat16* out) {
    const unsigned u = bits_of(x), rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    out->bits = (unsigned short)((u & ~kSignBit) > 0x7f800000u ? 0x7fc0u : rounded);
}
DS_FUNCTION void from_float(float x, Half* out) {
    const unsigned u = bits_of(x), sign = (u >> 16) & 0x8000u, m = u & ~kSignBit;
    unsigned h;
    if (m > 0x7f800000u) h = 0x7e00u | ((m >> 13) & 0x1ffu);
    else if (m >= 0x477ff000u) h = m < 0x7f800000u ? 0x7bffu : 0x7c00u;
    else if (m >= 0x38800000u) h = (m + 0xfffu + ((m >> 13) & 1) - 0x38000000u) >> 13;
    else if (m < 0x33000000u) h = 0;  // under half of the smallest half denormal
    else {
        const unsigned fraction = (m & 0x7fffffu) | 0x800000u, shift = 126 - (m >> 23);
        const unsigned rest = fraction & ((1u << shift) - 1), tie = 1u << (shift - 1);
        h = fraction >> shift;
        h += rest > tie || (rest == tie && (h & 1));
    }
    out->bits = (unsigned short)(sign | h);
}

DS_FUNCTION float largest_of(const float*) { return float_of(kMaxFinite); }
DS_FUNCTION float largest_of(const Half*) { return 65504.f; }
DS_FUNCTION float largest_of(const BFloat16*) { return float_of(0x7f7f0000u); }

// By what to multiply values of up to a scale, so that dividing by the scale leaves no denormal: 1, but for huge ones.
DS_FUNCTION float shrink_of(float scale) { return scale > 0x1p100f ? 0x1p-30f : 1.f; }

// The widest step of which so many fit a float.
DS_FUNCTION float widest_step(float levels) {
    const float step = float_of(kMaxFinite) / levels;
    return bits_of(step * levels) > kMaxFinite ? float_of(bits_of(step) - 1) : step;
}

}  // namespace

#endif
