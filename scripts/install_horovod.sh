#!/usr/bin/env bash
# Builds Horovod from PyPI's source release for the torch of a virtual environment, and installs it there.
#
#     scripts/install_horovod.sh VENV
#
# Horovod 0.28.1 asks for C++14 and does not compile against torch >= 2.1, which needs C++17: two CMake lines.
# Nothing else is changed. The wheel is kept under ${XDG_CACHE_HOME:-~/.cache}/ds_horovod, keyed by all that
# decides what is built (Horovod, Python, torch, every HOROVOD_* variable), so a second run only installs it.
# HOROVOD_* variables pass through: HOROVOD_GPU_OPERATIONS=NCCL scripts/install_horovod.sh .venv
set -euo pipefail

version=0.28.1
python=$(cd "$1/bin" && pwd)/python
export PATH="$(dirname "$python"):$PATH"          # CMake must find this environment's Python, not the system's

export HOROVOD_WITH_PYTORCH=1
export HOROVOD_WITH_GLOO=${HOROVOD_WITH_GLOO:-1}
export HOROVOD_WITHOUT_TENSORFLOW=${HOROVOD_WITHOUT_TENSORFLOW:-1}
export HOROVOD_WITHOUT_MXNET=${HOROVOD_WITHOUT_MXNET:-1}
if [ -z "${HOROVOD_WITH_MPI:-}" ]; then export HOROVOD_WITHOUT_MPI=${HOROVOD_WITHOUT_MPI:-1}; fi

built_for=$("$python" -c 'import sys, sysconfig, torch
print(sys.implementation.cache_tag, sysconfig.get_platform(), torch.__version__, torch._C._GLIBCXX_USE_CXX11_ABI)')
key=$(printf '%s\n' "$version $built_for" "$(env | grep '^HOROVOD_' | sort)" | sha256sum | cut -c1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/ds_horovod/$key

if ! ls "$cache"/horovod-*.whl >/dev/null 2>&1; then
    for tool in g++ cmake make; do
        command -v $tool >/dev/null || { echo "building Horovod needs $tool; install it first" >&2; exit 1; }
    done
    echo "building Horovod $version for $built_for (some minutes, once)"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$python" -m pip install --quiet 'setuptools<81' wheel packaging cffi cloudpickle psutil pyyaml
    "$python" -m pip download --quiet --no-deps --no-binary horovod --no-build-isolation --dest "$work" "horovod==$version"
    tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
    sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 17)/' \
        "$work/horovod-$version/CMakeLists.txt" "$work/horovod-$version/horovod/torch/CMakeLists.txt"
    if ! MAKEFLAGS=${MAKEFLAGS:--j$(nproc)} "$python" -m pip wheel --no-deps --no-build-isolation \
        --wheel-dir "$work" "$work/horovod-$version" >"$work/build.log" 2>&1; then
        tail -n 100 "$work/build.log" >&2
        echo "Horovod did not build; the end of its log is above" >&2
        exit 1
    fi
    mkdir -p "$cache"
    mv "$work"/horovod-*.whl "$cache/"
fi
"$python" -m pip install --quiet "$cache"/horovod-*.whl
