"""What of benchmarks/gpu.py can be seen without a GPU."""

import subprocess
import sys

import numpy
import pytest
import torch
from gpu import WORKERS, OperationByOperation
from horovod_jobs import ROOT
from support import generator


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_to_run_without_a_gpu():
    result = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "torch finds no GPU" in result.stderr


def test_the_chain_of_operations_conserves():
    """At the worker and at the server, v == Q[v] + error, with NumPy in CuPy's place."""
    gradient = torch.randn(64 * WORKERS * 10, generator=generator(0))
    chain = OperationByOperation(numpy, gradient)
    packed, scale = chain.compress(gradient, chain.worker_error)
    assert packed.numel() == gradient.numel() // 8
    torch.testing.assert_close(chain.signs(packed) * scale + chain.worker_error, gradient)
    before = chain.worker_error.clone()
    chain.exchange()
    assert chain.out.shape == gradient.shape and len(chain.out.abs().unique()) == 1
    assert not torch.equal(chain.worker_error, before) and chain.server_error.any()
