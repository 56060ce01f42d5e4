// The counter-based generator Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011), for CPU and CUDA alike.
//
// Row r of a pass is the counter (r, step, bucket, sender), whose four words are eight numbers of 16 bits, the low half of
// a word first: they belong to the elements 8r .. 8r+7. An element draws the same number whoever works on it.
#ifndef DS_SHARED_PHILOX
#define DS_SHARED_PHILOX

namespace {

// The key is the low and the high half of a seed; the counter follows the row.
struct Philox {
    unsigned key[2], counter[3];
};

// One generator at a time. The CPU has another one of these, for eight at a time.
struct OneWord {
    using Word = unsigned;

    DS_FUNCTION static unsigned splat(unsigned x) { return x; }
    DS_FUNCTION static void multiply(unsigned a, unsigned b, unsigned& high, unsigned& low) {
        const unsigned long long product = (unsigned long long)a * b;
        high = unsigned(product >> 32);
        low = unsigned(product);
    }
    DS_FUNCTION static unsigned mix(unsigned a, unsigned b, unsigned key) { return a ^ b ^ key; }
};

// The four words of a row, or of as many rows as a Word holds.
template <class Words>
DS_FUNCTION void random_words(const Philox& random, typename Words::Word row, typename Words::Word x[4]) {
    unsigned key[2] = {random.key[0], random.key[1]};
    x[0] = row;
    for (int i = 0; i < 3; i++) x[i + 1] = Words::splat(random.counter[i]);
#ifdef DS_CUDA  // where registers are scarce
#pragma unroll 1
#endif
    for (int round = 0; round < 10; round++) {
        typename Words::Word high_a, low_a, high_b, low_b;
        Words::multiply(0xd2511f53u, x[0], high_a, low_a);
        Words::multiply(0xcd9e8d57u, x[2], high_b, low_b);
        x[0] = Words::mix(high_b, x[1], key[0]);
        x[2] = Words::mix(high_a, x[3], key[1]);
        x[1] = low_b;
        x[3] = low_a;
        key[0] += 0x9e3779b9u;
        key[1] += 0xbb67ae85u;
    }
}

}  // namespace

#endif
