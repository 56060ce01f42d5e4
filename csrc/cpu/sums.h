// Sums in one fixed order, which a GPU's warps can follow too.
//
// 32 lanes, lane j takes every 32nd element from j on, first within groups of 8 rows of 32, then over the groups; then the
// lanes pairwise, 8 apart, 16, 1, 2, 4. Sums of regions larger than a block add the blocks' sums in double: 256 lanes, then
// pairwise 128 apart, 64, .., 1.
#pragma once

#include "simd.h"

namespace {

constexpr int64_t kRow = 32, kGroup = 8 * kRow;

// Adds up rows of 32 values in the fixed order.
struct RowSum {
    F8 group[4], total[4];
    RowSum() { for (int q = 0; q < 4; q++) group[q] = total[q] = splat(0); }
    void close_group() {
        for (int q = 0; q < 4; q++) {
            total[q] = add(total[q], group[q]);
            group[q] = splat(0);
        }
    }
    float finish() {
        close_group();
        float x[8];
        store(x, add(add(total[0], total[1]), add(total[2], total[3])));
        return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    }
};

}  // namespace
