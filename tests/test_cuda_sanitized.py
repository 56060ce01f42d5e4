"""Emulated kernels touch nothing that is not theirs, under ASan and UBSan: odd sizes and addresses, padding, noisy payloads."""

import sys
from pathlib import Path

import pytest
from emulator import sanitized

pytestmark = pytest.mark.jobs
HERE = Path(__file__).parent


@pytest.mark.parametrize("tests", ["corrupt or address or padding", "rollback and (OneBit or Cast or RandomK)"])
def test_emulated_kernels_stay_inside(tests):
    files = sorted(str(path) for path in HERE.glob("test_cuda_emulated*.py"))
    # Not captured: AddressSanitizer ends the process, and what pytest has captured with it.
    options = ["-q", "-x", "-pno:cacheprovider", "-pno:xdist", "--capture=no"]
    result = sanitized([sys.executable, "-m", "pytest", *options, *files, "-k", tests])
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert "passed" in result.stdout


def test_a_read_past_the_end_would_be_seen(tmp_path):
    script = tmp_path / "past_the_end.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(HERE / "cuda")!r}]
import torch
from emulator import EmulatedDevice
from unittest import mock
from ds_horovod import Cast, kernels
from ds_horovod.kernels import cuda, launch
from ds_horovod.layout import pack
from ds_horovod.feedback import FeedbackState

spoil = lambda family, source: source.replace("j < count ? to_float(p[j])", "j <= count ? to_float(p[j])")
layout = pack([33], 32, 1)
with mock.patch.object(launch, "device_of", return_value=EmulatedDevice(mutate=spoil)):
    with mock.patch.object(kernels, "for_device", return_value=cuda):
        payload = torch.zeros(1, Cast().chunk_nbytes(layout), dtype=torch.uint8)
        Cast().encode(layout, [torch.zeros(33)], FeedbackState(), payload)
""")
    result = sanitized([sys.executable, str(script)])
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr
