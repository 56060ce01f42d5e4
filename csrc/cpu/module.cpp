// The binding: ds_horovod._cpu. It checks what would otherwise write out of bounds, and releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
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

    template <class Format>
    Call(const Format& format, const OwnedLayout& owned, const std::string& dtype_name, const std::vector<uintptr_t>& tensors,
         uintptr_t chunks_, int64_t bytes, int64_t expected_chunks, int threads)
        : layout(owned.view()), dtype(dtype_of(dtype_name)), chunks(at<uint8_t>(chunks_)) {
        for (uintptr_t t : tensors) data.push_back(at<void>(t));
        require(dtype == Dtype::none || int64_t(data.size()) == layout.tensors, "as many tensors as the layout has");
        require(bytes == expected_chunks * format.chunk_bytes, "a payload of another size than the layout's: truncated?");
        require(chunks_ % 16 == 0 && format.chunk_bytes % 16 == 0, "payloads must be 16-byte aligned");
        require(threads >= 1, "threads must be positive");
        format.check(layout);
    }
    Tensors tensors() const { return {dtype, data.data()}; }
};

using Addresses = std::vector<uintptr_t>;

FeedbackState state_of(uintptr_t error, uintptr_t velocity, float momentum, uint32_t bucket, uint32_t sender,
                       uint32_t first_shard, uint32_t step) {
    require(!velocity || error, "a velocity needs an error");
    return {at<float>(error), at<float>(velocity), momentum, bucket, sender, first_shard, step};
}

// A format as a class of the module, whose methods are the passes of its family.
template <class Format>
py::object define(py::module_& m, const char* class_name, std::string family, const Passes<Format> Kernels::*passes) {
    std::replace(family.begin(), family.end(), '_', '-');  // as messages spell it
    auto require_sound = [=](const Format& format, const Call& call) {
        const auto find_fault = (kernels->*passes).fault;
        if (const char* fault = find_fault ? find_fault(format, call.layout, call.chunks) : nullptr)
            throw std::invalid_argument("corrupted " + family + " payload: " + fault);
    };
    py::class_<Format> c(m, class_name);
    c.def(py::init(&Format::of));
    c.def("encode", [=](const Format& format, const OwnedLayout& layout, const std::string& dtype, const Addresses& data,
                        const FeedbackState& state, uintptr_t chunks, int64_t bytes, int threads) {
        const Call call(format, layout, dtype, data, chunks, bytes, layout.shards, threads);
        require(call.dtype != Dtype::none || state.error, "nothing to encode");
        require(call.dtype != Dtype::none || !state.velocity, "a velocity needs gradients");
        require(takes_velocity(format) || !state.velocity, "signs of all elements leave no velocity");
        py::gil_scoped_release release;
        (kernels->*passes).encode(format, call.layout, call.tensors(), state, call.chunks, threads);
    });
    c.def("decode", [=](const Format& format, const OwnedLayout& layout, const std::string& dtype, const Addresses& data,
                        uintptr_t chunks, int64_t bytes, int threads) {
        const Call call(format, layout, dtype, data, chunks, bytes, layout.shards, threads);
        require(call.dtype != Dtype::none, "nowhere to decode to");
        py::gil_scoped_release release;
        require_sound(format, call);
        (kernels->*passes).decode(format, call.layout, call.chunks, call.tensors(), threads);
    });
    c.def("accumulate", [=](const Format& format, const OwnedLayout& layout, uintptr_t chunk, int64_t bytes, float weight,
                            uintptr_t sum, int threads) {
        const Call call(format, layout, "none", {}, chunk, bytes, 1, threads);
        require(layout.shards == 1, "a server has one shard");
        py::gil_scoped_release release;
        require_sound(format, call);
        (kernels->*passes).accumulate(format, call.layout, call.chunks, weight, at<float>(sum), threads);
    });
    c.def("is_within", [=](const Format& format, const OwnedLayout& layout, uintptr_t chunks, int64_t bytes, int64_t count,
                           float limit) {
        const Call call(format, layout, "none", {}, chunks, bytes, count, 1);
        py::gil_scoped_release release;
        return (kernels->*passes).is_within(format, call.layout, call.chunks, count, limit);
    });
    // Returns false, and does nothing, where no kernel does all of it at once.
    c.def("serve", [=](const Format& format, const OwnedLayout& layout, uintptr_t pushed, int64_t pushed_bytes,
                       int64_t workers, float weight, const FeedbackState& state, uintptr_t chunk, int64_t bytes, int threads) {
        if (!(kernels->*passes).serve || !fuses_serve(format)) return false;
        const Call call(format, layout, "none", {}, chunk, bytes, 1, threads);
        require(layout.shards == 1, "a server has one shard");
        require(pushed % 16 == 0 && pushed_bytes == workers * format.chunk_bytes,
                "a payload of another size than the layout's");
        py::gil_scoped_release release;
        (kernels->*passes).serve(format, call.layout, at<uint8_t>(pushed), workers, weight, state, call.chunks, threads);
        return true;
    });
    return c;
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
    py::class_<FeedbackState>(m, "FeedbackState").def(py::init(&state_of));
    py::dict families;
#define DS_DEFINE(name, Format) families[#name] = define<Format>(m, #Format, #name, &Kernels::name);
    DS_FAMILIES(DS_DEFINE)
#undef DS_DEFINE
    m.attr("families") = families;

    m.def("all_within", [](uintptr_t values, int64_t count, float limit) {
        py::gil_scoped_release release;
        return kernels->all_within(at<float>(values), count, limit);
    });
    m.def("uniforms_of_rows", [](uint64_t seed, uint32_t step, uint32_t bucket, uint32_t sender, uint64_t first_row,
                                 int64_t rows) {
        std::vector<float> values(size_t(8 * rows));
        const uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)}, counter[3] = {step, bucket, sender};
        kernels->uniforms_of_rows(key, counter, first_row, rows, values.data());
        return values;
    });
}
