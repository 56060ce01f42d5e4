// The kernels for processors with AVX2, F16C and BMI. AVX-512 was tried and gains nothing: the memory is the limit.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

// From here on only: nothing of the standard library may be compiled for this target, since the linker might give that
// copy to another translation unit.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,bmi,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,bmi,popcnt")
#endif
#define DS_AVX2
#include "elements.inl"
#include "one_bit.inl"
#include "quantize.inl"
#include "random.inl"
#include "top_k.inl"

const Kernels avx2_kernels = {
    {one_bit_encode, one_bit_decode, one_bit_accumulate, one_bit_serve},
    {top_k_encode, top_k_decode, top_k_accumulate, nullptr},
    {quantize_encode, quantize_decode, quantize_accumulate, quantize_serve},
    {cast_encode, cast_decode, cast_accumulate, nullptr},
    {random_k_encode, random_k_decode, random_k_accumulate, nullptr},
    cast_is_within, all_within, uniforms_of_rows,
};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
