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
#define DS_TABLE avx2_kernels
#include "families.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
