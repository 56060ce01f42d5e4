// Whether values stay within a limit.
#pragma once

#include "simd.h"

namespace {

// Whether all values are at most `limit` in magnitude. NaN is not.
template <class T>
bool all_within(const T* values, int64_t count, float limit) {
    const uint32_t over = bits_of(limit) + 1;
    int64_t i = 0;
    for (; i + 4096 <= count; i += 4096) {
        uint32_t found = 0;
        for (int64_t j = i; j < i + 4096; j += 8) found |= at_least(load(values + j), over);
        if (found) return false;
    }
    for (; i < count; i++)
        if (magnitude(to_float(values[i])) >= over) return false;
    return true;
}

// As above, for the values that begin at byte `at` of each of some chunks, `count` of them.
template <class T>
bool all_within(const uint8_t* chunks, int64_t chunk_count, int64_t chunk_bytes, int64_t at, int64_t count, float limit) {
    for (int64_t c = 0; c < chunk_count; c++)
        if (!all_within(reinterpret_cast<const T*>(chunks + c * chunk_bytes + at), count, limit)) return false;
    return true;
}

}  // namespace
