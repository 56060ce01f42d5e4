"""The CPU kernels. Everything else about the package stands in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

cpu_kernels = Pybind11Extension(
    "ds_horovod._cpu",
    ["csrc/cpu/module.cpp", "csrc/cpu/avx2.cpp", "csrc/cpu/portable.cpp"],
    depends=sorted(glob("csrc/cpu/*.h") + glob("csrc/cpu/*.inl") + glob("csrc/shared/*.h")),
    cxx_std=17,
    # No contraction to fused multiply-adds: every path must round in the same places.
    extra_compile_args=["-O3", "-ffp-contract=off", "-pthread"],
    extra_link_args=["-pthread"],
)

setup(ext_modules=[cpu_kernels], cmdclass={"build_ext": build_ext})
