"""Every CUDA kernel compiles for the architectures of today, with no spills and few registers. Needs no GPU."""

import re
from pathlib import Path

import pytest

from ds_horovod.kernels import launch

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="pip install 'ds-horovod[test]'")

pytestmark = pytest.mark.jobs
FAMILIES = sorted(path.stem for path in (Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
QUANTIZE = [(f"-DBITS={bits}", "-DSTOCHASTIC=0", "-DL2=0") for bits in (0, 2, 3, 4, 8)]
QUANTIZE += [("-DBITS=8", "-DSTOCHASTIC=1", "-DL2=0"), ("-DBITS=0", "-DSTOCHASTIC=1", "-DL2=1")]
SOURCES = [(family, options) for family in FAMILIES for options in (QUANTIZE if family == "quantize" else [()])]
# The oldest and the newest; of one family those between too, whose registers lie between theirs.
CASES = [(*source, architecture) for source in SOURCES for architecture in (75, 100)]
CASES += [("top_k", (), architecture) for architecture in (80, 90)]
# So 1024 threads share an SM's 65536 registers, each with 32 to 64 bytes of reads in flight.
MOST_REGISTERS = 64
MOST_SHARED = 48 * 1024


def checked(result):
    error, *values = result
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, error
    return values[0] if values else None


def compile_log(source, architecture, more=()):
    """What the assembler says of each kernel."""
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    options = [*launch.OPTIONS, *more, "-ftz=true", f"-arch=sm_{architecture}", "--ptxas-options=-v"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
    checked(nvrtc.nvrtcGetProgramLog(program, log))
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()[:4000]
    return log.decode()


def usage(log):
    """For each kernel: bytes of stack and spills, registers, bytes of shared memory."""
    found = {}
    for name, report in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.DOTALL):
        numbers = [int(n) for n in re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", report).groups()]
        shared = re.search(r"(\d+) bytes smem", report)
        found[name] = numbers, int(re.search(r"Used (\d+) registers", report)[1]), int(shared[1]) if shared else 0
    return found


@pytest.mark.parametrize("family, options, architecture", CASES)
def test_compiles_within_the_budget(family, options, architecture):
    source = launch.sources(family)
    found = usage(compile_log(source, architecture, options))
    assert len(found) == source.count('extern "C" __global__') > 0
    for name, (stack, registers, shared) in found.items():
        assert stack == [0, 0, 0], f"{name}: {stack} bytes of stack frame, spill stores and spill loads"
        assert registers <= MOST_REGISTERS and shared <= MOST_SHARED, f"{name}: {registers} registers, {shared} bytes shared"


def test_a_spill_would_be_seen():
    source = """
    extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* x) {
        float v[64];
        for (int i = 0; i < 64; i++) v[i] = x[i * 1024 + threadIdx.x];
        for (int i = 0; i < 64; i++) for (int j = 0; j < 64; j++) v[j] = v[j] * v[(i + j * 7) % 64] + v[i];
        for (int i = 0; i < 64; i++) x[i * 1024 + threadIdx.x] = v[i];
    }"""
    ((stack, _, _),) = usage(compile_log(source, 80)).values()
    assert stack[1] > 0
