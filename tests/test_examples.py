"""The examples run, with compression and without, and stay short."""

import json
import re
import subprocess
import sys

import pytest
import torch
from horovod_jobs import ROOT, run_ranks
from test_elastic import elastic

EXAMPLES = ROOT / "examples"
SMALL = {
    "horovod_digits.py": ["--epochs=2", "--warmup-epochs=1"],
    "horovod_resnet.py": [
        "--blocks",
        *"1111",
        "--width=8",
        "--image-size=32",
        "--batch-size=2",
        "--steps=4",
        "--warmup-steps=2",
    ],
    "horovod_gpt.py": [f"--file={EXAMPLES / 'horovod_gpt.py'}", "--steps=50", "--warmup-steps=5", "--width=64", "--layers=1"],
    "ddp_digits.py": ["--epochs=3"],
}
NONE = ["--compression", "none"]
RESUMED = ["horovod_digits.py", "--warmup-epochs=1", "--checkpoint=resumed.pt"]
COMMANDS = [
    *([name, *options, *how] for name, options in SMALL.items() for how in ([], NONE)),
    [*RESUMED, "--epochs=1"], [*RESUMED, "--epochs=2"],
]  # fmt: skip
# A checkpoint of its own for what must not go on from another one's.
COMMANDS[1] = [*COMMANDS[1], "--checkpoint=none.pt"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Where they ran, and what each of the commands has said."""
    folder = tmp_path_factory.mktemp("examples")
    output = run_ranks(2, str(ROOT / "tests" / "workers" / "examples.py"), str(folder), json.dumps(COMMANDS))
    said = re.split("^== .*\n", output, flags=re.MULTILINE)[1:]
    assert len(said) == len(COMMANDS), output
    return folder, said


pytestmark = [pytest.mark.jobs, pytest.mark.xdist_group("examples")]


def number(pattern, text):
    return float(re.search(pattern, text)[1])


def test_digits_learn_and_go_on_from_a_checkpoint(ran):
    folder, said = ran
    whole, uncompressed, first, second = said[0], said[1], said[-2], said[-1]
    for text in (whole, uncompressed):
        assert number(r"epoch 2: .*accuracy ([\d.]+)", text) > 0.6, text
    assert number(r"([\d.]+) times fewer", whole) > 5 and "times fewer" not in uncompressed
    assert "epoch 1:" in first and "epoch 1:" not in second and "epoch 2:" in second
    # The same data, rates, momenta and errors as without an interruption.
    both = [torch.load(folder / name, weights_only=True) for name in ("digits.pt", "resumed.pt")]
    assert [state["epoch"] for state in both] == [2, 2]
    whole, resumed = (torch.cat([w.flatten() for w in state["model"].values()]) for state in both)
    assert (whole - resumed).norm() < 0.005 * whole.norm()  # without the optimizer's momentum it is 0.03
    errors = [torch.cat([e.flatten() for e in state["errors"]["errors"].values()]) for state in both]
    assert all(e.norm() > 0 for e in errors)
    assert "errors" not in torch.load(folder / "none.pt", weights_only=True)


def test_a_resnet_is_timed(ran):
    compressed, uncompressed = ran[1][2:4]
    assert re.search(r"default: [\d.]+ images a second on 2 ranks", compressed), compressed
    assert re.search(r"none: [\d.]+ images a second on 2 ranks", uncompressed), uncompressed
    assert number(r"steps: (\d+)", compressed) == 3  # the first is left out
    assert number(r"compression_ratio: ([\d.]+)", compressed) > 4


def test_a_gpt_learns_with_a_third_of_a_bit(ran):
    compressed, uncompressed = ran[1][4:6]
    assert number(r"slow-network: ([\d.]+) bits", compressed) < 6, compressed  # 8 before training
    assert number(r"none: ([\d.]+) bits", uncompressed) < 6, uncompressed
    assert number(r"([\d.]+) times fewer", compressed) > 30 and "1.0 times fewer" in uncompressed


def test_digits_learn_with_distributed_data_parallel(ran):
    compressed, uncompressed = ran[1][6:8]
    assert all(number(r"accuracy ([\d.]+)", text) > 0.8 for text in (compressed, uncompressed))
    assert number(r"([\d.]+) times fewer", compressed) > 5 and "times fewer" not in uncompressed


def test_an_elastic_job(tmp_path):
    code, output = elastic(tmp_path, EXAMPLES / "horovod_elastic.py", "--epochs=1")
    assert code == 0 and re.search(r"epoch 1: loss [\d.]+ on 2 ranks", output), output[-4000:]


def test_the_elastic_example_without_compression():
    command = [sys.executable, str(EXAMPLES / "horovod_elastic.py"), *NONE, "--epochs=1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0 and "on 1 ranks" in result.stdout, result.stdout + result.stderr


def test_they_are_short_and_all_of_them_run():
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.name for file in files] == sorted([*SMALL, "horovod_elastic.py"])
    for file in files:
        assert len(file.read_text().splitlines()) < 120 and '"none"' in file.read_text()
