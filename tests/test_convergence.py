"""The experiments on convergence: their tasks, the loader of CIFAR-10, both transports, and files that are continued."""

import dataclasses
import io
import itertools
import json
import math
import pickle
import re
import struct
import subprocess
import sys

import convergence
import horovod.torch as hvd
import numpy as np
import pytest
import speedup
import tasks
import torch
from common import Cells
from convergence import RECIPES, InProcess, Recipe
from horovod_jobs import run_ranks
from learning import ADVICE

import ds_horovod
from ds_horovod import TopK


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, which has made the published files."""

    def _save(self, text):
        content = text.encode("latin-1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    dispatch = {**pickle._Pickler.dispatch, str: _save, bytes: _save}  # noqa: RUF012


def write_pickle(path, content):
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    # where numpy kept it when the files were made
    path.write_bytes(buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def write_cifar10(folder, images=6):
    """Small files in the published format. Returns all that they hold, in order: images, labels."""
    numbers = np.random.default_rng(0)
    names = [*tasks.CIFAR10_TRAIN, tasks.CIFAR10_TEST]
    data = numbers.integers(256, size=(len(names), images, 3072), dtype=np.uint8)
    labels = numbers.integers(10, size=(len(names), images)).tolist()
    folder.mkdir()
    for name, pixels, digits in zip(names, data, labels, strict=True):
        files = [f"{name}_{i}.png" for i in range(images)]
        write_pickle(folder / name, {"batch_label": name, "labels": digits, "data": pixels, "filenames": files})
    return data, labels


@pytest.fixture
def cifar10(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    return tmp_path / "cifar-10-batches-py"


# ---- CIFAR-10


def test_cifar10_files_hold_what_was_written(tmp_path):
    data, labels = write_cifar10(tmp_path / "x")
    x, y, test_x, test_y = tasks.load_cifar10(tmp_path / "x")
    assert x.dtype == torch.uint8 and x.shape == (30, 3, 32, 32) and test_x.shape == (6, 3, 32, 32)
    assert np.array_equal(x.numpy(), data[:5].reshape(30, 3, 32, 32)) and y.tolist() == [*itertools.chain(*labels[:5])]
    assert np.array_equal(test_x.numpy(), data[5].reshape(6, 3, 32, 32)) and test_y.tolist() == labels[5]


def test_cifar10_without_its_folder_or_files(tmp_path, cifar10):
    with pytest.raises(
        FileNotFoundError, match="nowhere: expected the folder cifar-10-batches-py of CIFAR-10, found no folder"
    ):
        tasks.load_cifar10(tmp_path / "nowhere")
    (cifar10 / "data_batch_3").unlink()
    (cifar10 / "test_batch").rename(cifar10 / "test_batch.bin")
    with pytest.raises(
        FileNotFoundError, match=r"expected data_batch_1, .*; data_batch_3, test_batch missing, found .*batch.bin"
    ):
        tasks.load_cifar10(cifar10)
    with pytest.raises(ValueError, match="expected --data DIR"):
        tasks.make("cifar10", 8)


GOOD = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 9]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dictionary with the keys b'data' and b'labels', found list"),
        ({"data": GOOD["data"]}, r"the keys b'data' and b'labels', found \[b'data'\]"),
        ({"data": GOOD["data"], "fine_labels": [1, 2]}, r"found \[b'data', b'fine_labels'\]"),
        ({**GOOD, "data": [[0] * 3072] * 2}, r"expected b'data' to be uint8 \(images, 3072\), found list"),
        ({**GOOD, "data": np.zeros((2, 3072), np.float32)}, r"found float32 \(2, 3072\)"),
        ({**GOOD, "data": np.zeros((2, 3, 32, 32), np.uint8)}, r"found uint8 \(2, 3, 32, 32\)"),
        ({**GOOD, "data": np.zeros((2, 1024), np.uint8)}, r"found uint8 \(2, 1024\)"),
        ({**GOOD, "labels": [1]}, "expected b'labels' to be a list of 2, one for each image, found 1 of them"),
        ({**GOOD, "labels": "ab"}, "expected b'labels' to be a list of 2, .* found bytes"),
        ({**GOOD, "labels": [1, 10]}, "expected labels from 0 to 9, found 10"),
        ({**GOOD, "labels": [-1, 10]}, "expected labels from 0 to 9, found -1"),
        ({**GOOD, "labels": [1, "1"]}, "expected labels from 0 to 9, found b'1'"),
    ],
)
def test_malformed_cifar10(cifar10, content, message):
    write_pickle(cifar10 / "data_batch_2", content)
    with pytest.raises(ValueError, match=f"data_batch_2: .*{message}"):
        tasks.load_cifar10(cifar10)


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02}q\x00(U\x06lab", pickle.dumps(subprocess.Popen)])
def test_a_file_that_is_no_batch_of_cifar10(cifar10, content):
    (cifar10 / "data_batch_5").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_5: expected a pickled batch of CIFAR-10, found none"):
        tasks.load_cifar10(cifar10)


def test_a_pickle_runs_no_code(cifar10, tmp_path):
    (cifar10 / "data_batch_1").write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "ran") + b"'\ntR.")
    with pytest.raises(ValueError, match=r"data_batch_1: .*os.system is not allowed"):
        tasks.load_cifar10(cifar10)
    assert not (tmp_path / "ran").exists()


def test_the_setting_of_the_paper(cifar10):
    task = tasks.TASKS["cifar10"](1, None, cifar10, batch_size=5)
    assert task.settings()["parameters"] == 11_171_146
    squeeze = RECIPES["paper-topk"].make_squeeze(task)
    assert isinstance(squeeze.options.compressor, TopK) and squeeze.options.compressor.k == 300_000
    assert (squeeze.options.server, squeeze.options.bucket_cap_mb) == (0, None)
    rates = [task.learning_rate(epoch * 6) for epoch in (0, 19, 20, 40, 59)]  # 30 images are 6 batches
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001]) and task.steps == 60 * 6
    with pytest.raises(ValueError, match="expected at least 8 x 256 images to train with, found 30"):
        tasks.make("cifar10", 8, data=cifar10)


def test_workers_share_an_epoch_of_cifar10(tmp_path):
    folder = tmp_path / "x"
    data, _ = write_cifar10(folder)
    for i, name in enumerate(tasks.CIFAR10_TRAIN):  # labels that tell the files apart, and images that tell their labels
        write_pickle(folder / name, {"data": np.full_like(data[0], i), "labels": [i] * 6})
    task = tasks.TASKS["cifar10"](3, None, folder, batch_size=5)
    for epoch in (0, 1):
        batches = [task.batch(7, worker, 2 * epoch + i) for worker in range(3) for i in range(2)]
        assert sorted(torch.cat([y for _, y in batches]).tolist()) == sorted([0, 1, 2, 3, 4] * 6)
    assert not torch.equal(task.batch(7, 0, 0)[1], task.batch(7, 0, 2)[1])


def test_augmented_images_are_crops_and_mirrors():
    images = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).view(2, 3, 32, 32) + 1
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for i in range(20):
        for image, crop in zip(padded, tasks.augmented(images, tasks.generator(i)), strict=True):
            found = [
                (top, left, mirrored)
                for top in range(9)
                for left in range(9)
                for mirrored in (False, True)
                if torch.equal(crop.flip(2) if mirrored else crop, image[:, top : top + 32, left : left + 32])
            ]
            assert len(found) == 1
            seen.update(found)
    assert len({(top, left) for top, left, _ in seen}) > 20 and len({mirrored for *_, mirrored in seen}) == 2


# ---- tasks


@pytest.mark.parametrize("name", ["digits", "gpt-sgd", "gpt-adamw"])
def test_tasks_repeat_themselves(name):
    task, again = tasks.make(name, 2), tasks.make(name, 2)
    assert task.settings() == again.settings()
    for p, q in zip(task.model(3).parameters(), again.model(3).parameters(), strict=True):
        assert torch.equal(p, q)
    x, y = task.batch(1, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip((x, y), again.batch(1, 2, 3), strict=True))
    for other in ((0, 2, 3), (1, 1, 3), (1, 2, 4), (2, 1, 3)):
        assert not torch.equal(x, task.batch(*other)[0])
    assert task.evaluate(task.model(0)) == again.evaluate(task.model(0))


def test_text_is_predicted_byte_by_byte():
    task = tasks.make("gpt-sgd", 1)
    x, y = task.batch(0, 0, 0)
    assert x.shape == y.shape == (8, 64) and torch.equal(x[:, 1:], y[:, :-1])
    text = tasks.standard_library()
    assert all(bytes(line.tolist()) in text[: int(0.9 * len(text))] for line in x)
    assert task.evaluate(task.model(0)) == pytest.approx(8.0, abs=0.5)  # it knows nothing yet
    assert f"{len(text)} bytes" in task.settings()["data"] and "Python 3." in task.settings()["data"]


def test_schedules():
    rate = tasks.cosine(300, 0.3, warmup=30)
    assert rate(0) == pytest.approx(0.01) and rate(29) == pytest.approx(0.3, rel=0.03) and rate(299) < 1e-4
    assert max(map(rate, range(300))) <= 0.3
    with pytest.raises(ValueError, match="name must be one of digits, gpt-sgd, gpt-adamw, cifar10, got 'mnist'"):
        tasks.make("mnist", 2)


# ---- runs


def run(recipe, steps=6, workers=2, task="digits"):
    return convergence.train(tasks.make(task, workers, steps), RECIPES[recipe], workers, 0, False, lambda: None)


@pytest.mark.parametrize("recipe", ["none", "onebit", "qsgd", "quantize-4", "sign-4.5%-momentum"])
def test_runs_repeat_themselves(recipe):
    first, second = run(recipe), run(recipe)
    del first["seconds"], second["seconds"]
    assert first == second
    assert len(first["losses"]) == 6 and [point["step"] for point in first["points"]] == [1, 2, 3, 4, 5, 6]


def test_uncompressed_training_is_training_on_the_mean_gradient():
    task = tasks.make("gpt-adamw", 3, steps=40)
    team = InProcess(task, RECIPES["none"], 3, 0)
    model = task.model(0)
    optimizer = task.optimizer(model.parameters(), task.momentum)
    for step in range(2):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for worker in range(3):
            x, y = task.batch(0, worker, step)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1  # the clipping is at work
            for summed, p in zip(total, model.parameters(), strict=True):
                summed += p.grad / 3
        for summed, p in zip(total, model.parameters(), strict=True):
            p.grad = summed
        optimizer.param_groups[0]["lr"] = task.learning_rate(step)
        optimizer.step()
        team.step(step)
    for p, q in zip(model.parameters(), team.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_batch_statistics_stay_with_their_worker():
    task = tasks.make("digits", 2, steps=5)
    team = InProcess(task, RECIPES["onebit"], 2, 0)
    alone = task.model(0)
    for worker in (1, 0):  # each worker's first batch, through the first weights
        alone = task.model(0)
        alone(task.batch(0, worker, 0)[0])
        expected = dict(alone.named_buffers())
        if worker:
            team.step(0)
        for name, buffer in team._buffers[worker].items():
            torch.testing.assert_close(buffer, expected[name])
    assert torch.equal(team.model[1].running_mean, team._buffers[0]["1.running_mean"])
    assert not torch.equal(team._buffers[0]["1.running_mean"], team._buffers[1]["1.running_mean"])


def test_momentum_is_in_one_place():
    for name, recipe in RECIPES.items():
        for task in (tasks.make("digits", 2), tasks.make("gpt-adamw", 2)):
            if convergence.recipe_problem(name, task, 2, ranks=True):
                continue
            (group,) = recipe.optimizer(task, task.model(0)).param_groups
            own = group["betas"][0] if "betas" in group else group["momentum"]
            theirs = recipe.make_squeeze(task).options.momentum if recipe.squeeze else 0.0
            assert (own, theirs) == ((0.0, recipe.momentum) if recipe.momentum else (task.momentum, 0.0))
            if recipe.squeeze:
                assert recipe.make_squeeze(task).options.max_norm == task.max_norm


@pytest.mark.parametrize(("what", "name"), sorted({(what, name) for _, what, runs in ADVICE for name in runs.values()}))
def test_what_is_advised_is_what_was_run(what, name):
    recipe = RECIPES[name]
    if not what.startswith("`"):
        assert recipe.squeeze is None
        return
    advised = eval(what.strip("`"), dict(vars(ds_horovod)))
    advised = advised() if isinstance(advised, type) else advised
    assert repr(advised) == repr(recipe.squeeze(momentum=recipe.momentum))


def test_bytes_of_a_run():
    dense, squeezed, warm = run("none", workers=4), run("onebit", workers=4), run("onebit-warm", workers=4)
    assert dense["bits_per_element"] == 32 and dense["bytes_sent"] == round(1.5 * 4 * 113386)
    assert 1 < squeezed["bits_per_element"] < 2 and 31 < warm["bits_per_element"] < 34
    sent = [point["bytes_sent"] for point in squeezed["points"]]
    assert sent == pytest.approx([squeezed["bytes_sent"] * step for step in range(1, 7)], rel=1e-4)
    assert all(point["worker_error_norm"] > 0 and point["server_error_norm"] > 0 for point in squeezed["points"])


def test_a_run_that_diverges_is_kept(monkeypatch):
    task = tasks.make("digits", 2, steps=3)
    broken = dataclasses.replace(task, learning_rate=lambda step: math.inf)
    result = convergence.train(broken, Recipe(), 2, 0, False, lambda: None)
    assert result["losses"][0] is not None and result["losses"][1:] == [None, None]
    json.dumps(result, allow_nan=False)


# ---- the command


def main(monkeypatch, *arguments):
    """What the command does in this process. Returns the runs that it has made."""
    made, original = [], convergence.train

    def train(task, recipe, workers, seed, ranks, tick):
        made.append((recipe, workers, seed))
        return original(task, recipe, workers, seed, ranks, tick)

    monkeypatch.setattr(convergence, "train", train)
    monkeypatch.setattr(sys, "argv", ["convergence.py", *arguments])
    try:
        convergence.main()
    finally:
        hvd.shutdown()
        monkeypatch.setattr(convergence, "train", original)
    return made


@pytest.mark.jobs
def test_ranks_and_workers_of_one_process_agree(tmp_path, monkeypatch, capsys):
    file = tmp_path / "x.json"
    recipes = ["none", "onebit", "quantize-4", "quantize-4-tentative", "topk-1%-momentum", "sign-4.5%-momentum"]
    arguments = ["--task", "digits", "--steps", "20", "--seeds", "1", "--json", str(file), "--recipes", *recipes]
    run_ranks(2, "benchmarks/convergence.py", *arguments, "ddp-powersgd-1")
    assert main(monkeypatch, *arguments, "--workers", "2") == [(RECIPES[name], 2, 1) for name in recipes]
    cells = {(cell["recipe"], cell["transport"]): cell for cell in json.loads(file.read_text())["cells"]}
    assert len(cells) == 2 * len(recipes) + 1
    for name in recipes:
        real, simulated = cells[name, "horovod"], cells[name, "in-process"]
        assert len(real["losses"]) == 20 and real["losses"][-1] < real["losses"][0] / 2
        assert real["losses"] == pytest.approx(simulated["losses"], rel=1e-3, abs=1e-4)
        assert real["bytes_sent"] == simulated["bytes_sent"]
        untold = {"metric": 0} | ({"server_error_norm": 0} if "tentative" in name else {})  # a server may be late, too
        for a, b in zip(real["points"], simulated["points"], strict=True):
            assert a | untold == pytest.approx(b | untold, rel=1e-3)
    # Without compression only the order of sums differs, and no small difference becomes another bit.
    dense = cells["none", "horovod"]["losses"]
    assert dense == pytest.approx(cells["none", "in-process"]["losses"], rel=1e-4, abs=1e-6)
    # PowerSGD begins with steps in which gradients travel as they are.
    start, powersgd = convergence.POWERSGD_START, cells["ddp-powersgd-1", "horovod"]
    assert powersgd["losses"][: start + 1] == pytest.approx(dense[: start + 1], rel=1e-3)
    assert powersgd["losses"][start + 1 :] != pytest.approx(dense[start + 1 :], rel=1e-3)
    assert 32 * start / 20 < powersgd["bits_per_element"] < 32 * (start + 2) / 20

    # What is there is not run again, and a run more is added.
    before, _ = file.read_text(), capsys.readouterr()
    assert main(monkeypatch, *arguments, "--workers", "2") == []
    assert file.read_text() == before and "topk-1%-momentum" in capsys.readouterr().out
    assert main(monkeypatch, *arguments, "topk-1%", "--workers", "2") == [(RECIPES["topk-1%"], 2, 1)]
    assert len(json.loads(file.read_text())["cells"]) == len(cells) + 1
    # Other settings are refused.
    with pytest.raises(SystemExit, match="cannot be continued: steps 20 there, 21 here"):
        main(monkeypatch, *arguments, "--steps", "21")


@pytest.mark.jobs
def test_powersgd_clips_what_each_rank_gives(tmp_path):
    file = tmp_path / "x.json"
    arguments = ["--task", "gpt-sgd", "--steps", "3", "--json", str(file), "--recipes", "ddp-powersgd-1"]
    run_ranks(2, "benchmarks/convergence.py", *arguments)
    (cell,) = json.loads(file.read_text())["cells"]
    task = tasks.make("gpt-sgd", 2, steps=3)
    losses = {}
    for max_norm in (1.0, None):
        team = InProcess(dataclasses.replace(task, max_norm=max_norm), RECIPES["none"], 2, 0)
        losses[max_norm] = [sum(team.step(step)) / 2 for step in range(3)]
    assert cell["losses"] == pytest.approx(losses[1.0], rel=1e-4)
    assert cell["losses"] != pytest.approx(losses[None], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "digits", "--recipes", "none", "gzip"], "argument --recipes: must name some of none, .*; got gzip"),
        (["--task", "mnist"], "argument --task: invalid choice: 'mnist'"),
        (["--task", "digits", "--seeds", "-1"], "argument --seeds: must be 0 or more, got -1"),
        (["--task", "digits", "--steps", "0"], "argument --steps: must be over 0"),
        (
            ["--task", "digits", "--recipes", "ddp-powersgd-1"],
            "ddp-powersgd-1 needs ranks of its own: start this with horovodrun",
        ),
        (["--task", "digits", "--recipes", "onebit", "--workers", "1"], "onebit needs 2 workers or more"),
        (["--task", "cifar10"], "cifar10: expected --data DIR"),
        (["--task", "cifar10", "--data", "/no/such/folder"], "/no/such/folder: expected the folder cifar-10-batches-py"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, *arguments, "--json", str(tmp_path / "x.json"))
    said = capsys.readouterr().err + str(stop.value.code)
    assert stop.value.code not in (0, None) and re.search(message, said)
    assert not (tmp_path / "x.json").exists()


def test_plain_sgd_has_no_momentum_to_correct(cifar10):
    task = tasks.TASKS["cifar10"](1, 1, cifar10, batch_size=5)
    problem = convergence.recipe_problem("topk-1%-momentum", task, 8, ranks=False)
    assert problem == "topk-1%-momentum needs a task with momentum, which cifar10 has not"


def test_the_command_refuses_momentum_for_plain_sgd(tmp_path, monkeypatch):
    write_cifar10(tmp_path / "data", images=103)  # two batches of 256
    arguments = ["--task", "cifar10", "--data", str(tmp_path / "data"), "--workers", "2", "--json", str(tmp_path / "x.json")]
    message = "argument --recipes: sign-4.5%-momentum needs a task with momentum, which cifar10 has not"
    with pytest.raises(SystemExit, match=message):
        main(monkeypatch, *arguments, "--recipes", "none", "sign-4.5%-momentum")
    assert not (tmp_path / "x.json").exists()


# ---- the file of cells


def test_cells_of_several_processes(tmp_path):
    file = tmp_path / "x.json"
    one, other = (Cells(file, {"steps": 3, "rates": (1, 2)}, ("recipe", "seed")) for _ in range(2))
    one.add(recipe="none", seed=0, metric=1.0)
    other.add(recipe="none", seed=1, metric=2.0)
    one.add(recipe="none", seed=0, metric=3.0)
    assert one.read() == other.read() and [cell["metric"] for cell in one.read()] == [3.0, 2.0]
    assert one.has(recipe="none", seed=1) and not one.has(recipe="onebit", seed=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_cells_of_something_else(tmp_path):
    file = tmp_path / "x.json"
    for content in ("{", "[]", '{"cells": []}', '{"settings": {}, "cells": [{"seed": 0}]}'):
        file.write_text(content)
        with pytest.raises(ValueError, match="holds no results of this benchmark"):
            Cells(file, {}, ("recipe",))
        assert file.read_text() == content
    file.write_text('{"settings": {"steps": 3, "old": 1}, "cells": []}')
    with pytest.raises(ValueError, match="cannot be continued: steps 3 there, 4 here, old 1 there, None here"):
        Cells(file, {"steps": 4}, ("recipe",))


# ---- linear speed-up


def test_efficiency():
    def cell(recipe, workers, seed, steps):
        return {"recipe": recipe, "workers": workers, "seed": seed, "steps": steps}

    cells = [cell("none", 1, 0, 900), cell("none", 1, 1, 1100), cell("none", 4, 0, 250), cell("none", 4, 1, 250)]
    cells += [cell("onebit", 4, 0, 300), cell("onebit", 4, 1, 325), cell("onebit", 8, 0, 100), cell("topk-1%", 4, 0, None)]
    found = {(e["recipe"], e["workers"]): (e["steps"], e["efficiency"], e["relative"]) for e in speedup.efficiencies(cells)}
    assert found["none", 1] == (1000, 1.0, 1.0) and found["none", 4] == (250, 1.0, 1.0)
    assert found["onebit", 4] == (312.5, 0.8, 0.8) and found["onebit", 8] == (100, 1.125, None)  # beside the same seed
    assert found["topk-1%", 4] == (None, None, None)
    assert "topk-1%" in speedup.summary(cells)


@pytest.mark.parametrize("recipe", ["none", "onebit"])
def test_steps_to_a_loss(recipe, monkeypatch):
    monkeypatch.setattr(speedup, "TARGET", 2.2)
    result = speedup.train(recipe, 8, 0, False, lambda samples: None)
    steps = [look["step"] for look in result["looks"]]
    assert result["steps"] == steps[-1] and steps == [32 * (i + 1) for i in range(len(steps))]
    assert sum(look["loss"] for look in result["looks"][-5:]) / 5 <= 2.2 < result["looks"][0]["loss"]
    assert (result["looks"][-1]["worker_error_norm"] > 0) == (recipe == "onebit")
    monkeypatch.setattr(speedup, "MOST_SAMPLES", 1024)
    assert speedup.train(recipe, 8, 0, False, lambda samples: None)["steps"] is None
