// The binding: ds_horovod._cpu. It checks what would otherwise write out of bounds, and releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

OpenMP openmp;

namespace py = pybind11;

namespace {

// What this processor can run, best first.
std::vector<std::pair<std::string, const Kernels*>> available() {
    std::vector<std::pair<std::string, const Kernels*>> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi"))
        found.emplace_back("avx2", &avx2_kernels);
#endif
    found.emplace_back("portable", &portable_kernels);
    return found;
}

const Kernels* kernels = available().front().second;

void use_instruction_set(const std::string& name) {
    for (const auto& [available_name, set] : available())
        if (available_name == name) {
            kernels = set;
            return;
        }
    throw std::invalid_argument("instruction set " + name + " is not available on this processor");
}

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

struct OwnedLayout {
    std::vector<int64_t> offset, numel;
    int64_t shards, shard_numel;

    OwnedLayout(std::vector<int64_t> offset_, std::vector<int64_t> numel_, int64_t shards_, int64_t shard_numel_)
        : offset(std::move(offset_)), numel(std::move(numel_)), shards(shards_), shard_numel(shard_numel_) {
        require(offset.size() == numel.size(), "as many offsets as numels");
        require(shards >= 1 && shard_numel >= 0 && shard_numel < (int64_t(1) << 32), "shard_numel must be under 2**32");
        int64_t free = 0;
        for (size_t i = 0; i < offset.size(); i++) {
            require(numel[i] > 0 && offset[i] >= free, "tensors must not be empty, nor overlap, and their offsets ascend");
            free = offset[i] + numel[i];
        }
        require(free <= shards * shard_numel, "tensors must end inside the last shard");
    }
    Layout view() const { return {int64_t(offset.size()), offset.data(), numel.data(), shards, shard_numel}; }
    bool is_aligned(int64_t block) const {
        return shard_numel % block == 0 && std::all_of(offset.begin(), offset.end(), [=](int64_t o) { return o % block == 0; });
    }
};

Dtype dtype_of(const std::string& name) {
    if (name == "none") return Dtype::none;
    if (name == "float32") return Dtype::float32;
    if (name == "float16") return Dtype::float16;
    if (name == "bfloat16") return Dtype::bfloat16;
    throw std::invalid_argument("no kernel for " + name);
}

// What every kernel is given, checked.
struct Call {
    Layout layout;
    std::vector<void*> data;
    Dtype dtype;
    uint8_t* chunks;

    template <class Codec>
    Call(const Codec& codec, const OwnedLayout& owned, const std::string& dtype_name, const std::vector<uintptr_t>& tensors,
         uintptr_t chunks_, int64_t bytes, int64_t expected_chunks, int threads)
        : layout(owned.view()), dtype(dtype_of(dtype_name)), chunks(at<uint8_t>(chunks_)) {
        for (uintptr_t t : tensors) data.push_back(at<void>(t));
        require(dtype == Dtype::none || int64_t(data.size()) == layout.tensors, "as many tensors as the layout has");
        require(bytes == expected_chunks * codec.chunk_bytes, "a payload of another size than the layout's: truncated?");
        require(chunks_ % 16 == 0 && codec.chunk_bytes % 16 == 0, "payloads must be 16-byte aligned");
        require(threads >= 1, "threads must be positive");
        check(codec, owned);
    }
    static void check(const OneBit& codec, const OwnedLayout& owned) {
        require(codec.block > 0 && codec.block % 32 == 0 && owned.is_aligned(codec.block), "tensors must start on blocks");
        require(codec.bits_at >= 4 * codec.scales && codec.chunk_bytes >= codec.bits_at + owned.shard_numel / 8 &&
                    (codec.granularity != Granularity::block || codec.scales >= owned.shard_numel / codec.block),
                "a chunk too small for its scales and signs");
    }
    static void check(const Quantize& codec, const OwnedLayout& owned) {
        require(codec.block > 0 && codec.block % 32 == 0 && owned.is_aligned(codec.block), "tensors must start on blocks");
        const int64_t blocks = owned.shard_numel / codec.block;
        require(codec.codes_at >= 4 * blocks && codec.chunk_bytes >= codec.codes_at + blocks * codec.block_bytes(),
                "a chunk too small for its scales and codes");
    }
    static void check(const Cast& codec, const OwnedLayout& owned) {
        require(owned.is_aligned(32), "tensors must start on blocks");
        require(codec.chunk_bytes >= 2 * owned.shard_numel, "a chunk too small for its values");
    }
    static void check(const RandomK& codec, const OwnedLayout& owned) {
        const int64_t k = codec.k;
        require(owned.is_aligned(32), "tensors must start on blocks");
        require(k >= 1 && k <= owned.shard_numel, "k must be positive, and no more than a shard has elements");
        require(codec.chunk_bytes >= int64_t(sizeof(RandomKHeader)) + (codec.half ? 2 : 4) * k,
                "a chunk too small for its values");
    }
    static void check(const TopK& codec, const OwnedLayout& owned) {
        const int64_t runs = (owned.shard_numel + 65535) / 65536, k = codec.k;
        const bool sign = codec.values == Values::sign;
        const int64_t rows = (owned.shard_numel + (int64_t(1) << codec.low_bits) - 1) >> codec.low_bits;
        require(k >= 0 && codec.low_bits >= 0 && codec.low_bits < 16 && codec.scales_at >= 4 * runs &&
                    codec.upper_at >= codec.scales_at + (sign ? 2 * ((k + 63) / 64 + runs) : 0) &&
                    codec.low_at >= codec.upper_at + (rows + (codec.low_bits ? k : 0) + 7 * runs) / 8 &&
                    codec.values_at >= codec.low_at + (k * (codec.low_bits + sign) + 7 * runs) / 8 + 8 &&  // read ahead
                    codec.chunk_bytes >= codec.values_at + (sign ? 0 : codec.values == Values::fp16 ? 2 : 4) * k,
                "a chunk too small for its counts, offsets and values");
    }
    Tensors tensors() const { return {dtype, data.data()}; }
    template <class Codec> void require_sound(const Codec&) const {}  // others hold no positions
    void require_sound(const TopK& codec) const {
        if (const char* fault = top_k_fault(codec, layout, chunks))
            throw std::invalid_argument(std::string("corrupted top-k payload: ") + fault);
    }
    void require_sound(const RandomK& codec) const {
        if (const char* fault = random_k_fault(codec, layout, chunks))
            throw std::invalid_argument(std::string("corrupted random-k payload: ") + fault);
    }
};

OneBit one_bit(int64_t block, const std::string& scale, const std::string& granularity, int64_t scales, int64_t bits_at,
               int64_t chunk_bytes) {
    const auto g = granularity == "block" ? Granularity::block
                   : granularity == "parameter" ? Granularity::parameter : Granularity::bucket;
    return {block, scale == "l2", g, scales, bits_at, chunk_bytes};
}

using Addresses = std::vector<uintptr_t>;

Memory memory_of(uintptr_t error, uintptr_t velocity, float momentum, uint32_t bucket, uint32_t sender,
                 uint32_t first_shard, uint32_t step) {
    require(!velocity || error, "a velocity needs an error");
    return {at<float>(error), at<float>(velocity), momentum, bucket, sender, first_shard, step};
}

// The passes of a codec, as functions called NAME_encode and so on.
template <class Codec>
void define_passes(py::module_& m, const std::string& name, const Passes<Codec> Kernels::*passes) {
    m.def((name + "_encode").c_str(), [=](const Codec& codec, const OwnedLayout& layout, const std::string& dtype,
                                          const Addresses& data, const Memory& memory, uintptr_t chunks, int64_t bytes,
                                          int threads) {
        const Call call(codec, layout, dtype, data, chunks, bytes, layout.shards, threads);
        require(call.dtype != Dtype::none || memory.error, "nothing to encode");
        require(call.dtype != Dtype::none || !memory.velocity, "a velocity needs gradients");
        if constexpr (std::is_same_v<Codec, OneBit>) require(!memory.velocity, "signs of all elements leave no velocity");
        py::gil_scoped_release release;
        (kernels->*passes).encode(codec, call.layout, call.tensors(), memory, call.chunks, threads);
    });
    m.def((name + "_decode").c_str(), [=](const Codec& codec, const OwnedLayout& layout, const std::string& dtype,
                                          const Addresses& data, uintptr_t chunks, int64_t bytes, int threads) {
        const Call call(codec, layout, dtype, data, chunks, bytes, layout.shards, threads);
        require(call.dtype != Dtype::none, "nowhere to decode to");
        py::gil_scoped_release release;
        call.require_sound(codec);
        (kernels->*passes).decode(codec, call.layout, call.chunks, call.tensors(), threads);
    });
    m.def((name + "_accumulate").c_str(), [=](const Codec& codec, const OwnedLayout& layout, uintptr_t chunk, int64_t bytes,
                                              float weight, uintptr_t sum, int threads) {
        const Call call(codec, layout, "none", {}, chunk, bytes, 1, threads);
        require(layout.shards == 1, "a server has one shard");
        py::gil_scoped_release release;
        call.require_sound(codec);
        (kernels->*passes).accumulate(codec, call.layout, call.chunks, weight, at<float>(sum), threads);
    });
    if (!(kernels->*passes).serve) return;
    m.def((name + "_serve").c_str(), [=](const Codec& codec, const OwnedLayout& layout, uintptr_t pushed, int64_t pushed_bytes,
                                         float weight, const Memory& memory, uintptr_t chunk, int64_t bytes, int threads) {
        const Call call(codec, layout, "none", {}, chunk, bytes, 1, threads);
        require(layout.shards == 1, "a server has one shard");
        if constexpr (std::is_same_v<Codec, OneBit>)
            require(codec.granularity == Granularity::block, "only scales of blocks are fused");
        require(pushed % 16 == 0 && pushed_bytes % codec.chunk_bytes == 0, "a payload of another size than the layout's");
        py::gil_scoped_release release;
        (kernels->*passes).serve(codec, call.layout, at<uint8_t>(pushed), pushed_bytes / codec.chunk_bytes, weight, memory,
                                 call.chunks, threads);
    });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Fused CPU kernels. ds_horovod/kernels/cpu.py is the only caller and says what the arguments are.";

    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const auto& [name, set] : available()) names.push_back(name);
        return names;
    });
    m.def("use_instruction_set", &use_instruction_set);
    m.def("use_openmp", [](uintptr_t parallel_, uintptr_t thread_num, uintptr_t num_threads) {
        openmp = {reinterpret_cast<decltype(openmp.parallel)>(parallel_), reinterpret_cast<int (*)()>(thread_num),
                  reinterpret_cast<int (*)()>(num_threads)};
    });

    py::class_<OwnedLayout>(m, "Layout")
        .def(py::init<std::vector<int64_t>, std::vector<int64_t>, int64_t, int64_t>());
    py::class_<OneBit>(m, "OneBit").def(py::init(&one_bit));
    py::class_<Memory>(m, "Memory").def(py::init(&memory_of));
    py::class_<Quantize>(m, "Quantize")
        .def(py::init([](int64_t block, int bits, int64_t levels, bool stochastic, bool l2, int64_t codes_at,
                         int64_t chunk_bytes, uint64_t seed) {
            return Quantize{block, bits, levels, stochastic, l2, codes_at, chunk_bytes, seed};
        }));
    py::class_<TopK>(m, "TopK").def(
        py::init([](int64_t k, const std::string& values, int low_bits, int64_t scales_at, int64_t upper_at, int64_t low_at,
                    int64_t values_at, int64_t chunk_bytes) {
            const auto v = values == "fp32" ? Values::fp32 : values == "fp16" ? Values::fp16 : Values::sign;
            return TopK{k, v, low_bits, scales_at, upper_at, low_at, values_at, chunk_bytes};
        }));

    py::class_<Cast>(m, "Cast").def(py::init([](const std::string& dtype, int64_t chunk_bytes) {
        return Cast{dtype == "fp16" ? Dtype::float16 : Dtype::bfloat16, chunk_bytes};
    }));
    py::class_<RandomK>(m, "RandomK").def(
        py::init([](int64_t k, const std::string& values, uint64_t seed, int64_t chunk_bytes) {
            return RandomK{k, values == "fp16", seed, chunk_bytes};
        }));

    define_passes(m, "one_bit", &Kernels::one_bit);
    define_passes(m, "top_k", &Kernels::top_k);
    define_passes(m, "quantize", &Kernels::quantize);
    define_passes(m, "cast", &Kernels::cast);
    define_passes(m, "random_k", &Kernels::random_k);
    m.def("cast_is_within", [](const Cast& codec, uintptr_t chunks, int64_t bytes, float limit) {
        require(chunks % 16 == 0 && bytes % codec.chunk_bytes == 0, "a payload of another size than the layout's");
        py::gil_scoped_release release;
        return kernels->cast_is_within(codec, at<uint8_t>(chunks), bytes, limit);
    });

    m.def("all_within", [](uintptr_t values, int64_t count, float limit) {
        py::gil_scoped_release release;
        return kernels->all_within(at<float>(values), count, limit);
    });
    m.def("uniforms_of_rows", [](uint64_t seed, uint32_t step, uint32_t bucket, uint32_t sender, uint64_t first_row,
                                 int64_t rows) {
        std::vector<float> values(size_t(8 * rows));
        const Philox random = {{uint32_t(seed), uint32_t(seed >> 32)}, {step, bucket, sender}};
        kernels->uniforms_of_rows(random, first_row, rows, values.data());
        return values;
    });
}
