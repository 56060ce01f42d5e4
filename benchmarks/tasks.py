"""What the benchmarks of convergence learn: real data, a model, an optimizer and a schedule, by name.

=========  ==========================================================================================
digits     scikit-learn's digits, a small CNN with BatchNorm, SGD with momentum
gpt-sgd    the Python standard library byte by byte, a transformer, SGD with momentum
gpt-adamw  the same with AdamW
cifar10    CIFAR-10, PreActResNet18, plain SGD: the setting of Tang et al. 2019 (arXiv 1905.05957)
=========  ==========================================================================================

Nothing is downloaded. A batch depends on seed, worker and step alone, whoever makes it: workers in one process and
ranks of their own see the same data.
"""

from __future__ import annotations

import io
import math
import pickle
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from models import digits_cnn, gpt_small, preact_resnet18
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class Task:
    """Something to learn. The loss is cross entropy."""

    name: str
    build: Callable[[], nn.Module]
    """A new model; weights are drawn from torch's generator."""
    batch: Callable[[int, int, int], tuple[Tensor, Tensor]]
    """``batch(seed, worker, step)`` gives input and target."""
    evaluate: Callable[[nn.Module], float]
    """The metric on data that no worker trains with."""
    metric: str
    """Its name."""
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
    """``optimizer(parameters, momentum)``; the momentum is 0 where the exchange of gradients takes care of it."""
    learning_rate: Callable[[int], float]
    """By step, from 0 on."""
    momentum: float
    """Of SGD, or Adam's beta1."""
    max_norm: float | None
    """Each worker clips its own gradient to this l2 norm. None: nobody does."""
    steps: int
    facts: dict[str, Any]
    """For whoever reads the results: data, and what the functions above hide."""

    def model(self, seed: int) -> nn.Module:
        """A new model, the same for the same seed."""
        torch.manual_seed(seed)
        return self.build()

    def settings(self) -> dict[str, Any]:
        """All that results depend on, for JSON."""
        parameters = sum(p.numel() for p in self.model(0).parameters())
        named = {key: getattr(self, key) for key in ("steps", "momentum", "max_norm", "metric")}
        return {"task": self.name, "parameters": parameters, **named, **self.facts}


def generator(*key: int) -> Generator:
    """A stream of random numbers for each key."""
    return Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def cosine(steps: int, peak: float, warmup: int) -> Callable[[int], float]:
    """A learning rate that rises linearly for `warmup` steps and falls to zero as half a cosine over all of them."""
    return lambda step: peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _sgd(parameters: Iterable[nn.Parameter], momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0, momentum=momentum)


def _adamw(parameters: Iterable[nn.Parameter], momentum: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.0, betas=(momentum, 0.95), weight_decay=0.01)


def _accuracy(images: Tensor, labels: Tensor, size: int = 500) -> Callable[[nn.Module], float]:
    """The share of images that a model gets right, in evaluation mode."""

    def evaluate(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            correct = sum(
                int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(size), labels.split(size), strict=True)
            )
        model.train()
        return correct / len(labels)

    return evaluate


# ---- digits


def digits_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``(n, 64)`` and labels of 1200 digits to train with, then of 597 to test; the split is always the same."""
    pixels, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(pixels / 16, digits, test_size=597, random_state=0, stratify=digits)
    x, test_x = (torch.tensor(pixels, dtype=torch.float32) for pixels in (train_x, test_x))
    return x, torch.tensor(train_y), test_x, torch.tensor(test_y)


def _digits(workers: int, steps: int | None, data: Path | None) -> Task:
    batch_size, peak, steps = 16, 0.05, steps or 400
    flat_x, y, flat_test_x, test_y = digits_data()
    x, test_x = flat_x.view(-1, 1, 8, 8), flat_test_x.view(-1, 1, 8, 8)

    def batch(seed: int, worker: int, step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(x), (batch_size,), generator=generator(seed, worker, step))
        return x[chosen], y[chosen]

    return Task(
        name="digits",
        build=digits_cnn,
        batch=batch,
        evaluate=_accuracy(test_x, test_y),
        metric="test accuracy",
        optimizer=_sgd,
        learning_rate=cosine(steps, peak, warmup=30),
        momentum=0.9,
        max_norm=None,
        steps=steps,
        facts={
            "data": f"digits of scikit-learn: {len(x)} to train with, {len(test_x)} to test",
            "batch_size": batch_size,
            "optimizer": f"SGD, learning rate {peak}: 30 steps of warm-up, cosine to 0",
        },
    )


# ---- text


def standard_library() -> bytes:
    """The modules at the top level of this Python's standard library, one after the other by name."""
    return b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))


def _gpt(adamw: bool) -> Callable[[int, int | None, Path | None], Task]:
    def make(workers: int, steps: int | None, data: Path | None) -> Task:
        batch_size, context, steps = 8, 64, steps or 900
        peak = 2e-3 if adamw else 0.3
        text = standard_library()
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        cut = int(0.9 * len(tokens))
        # All stretches of a context and the byte after it, as views.
        train, validation = (part.unfold(0, context + 1, 1) for part in (tokens[:cut], tokens[cut:]))

        def sample(windows: Tensor, size: int, numbers: Generator) -> tuple[Tensor, Tensor]:
            sequences = windows[torch.randint(len(windows), (size,), generator=numbers)].long()
            return sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()

        def batch(seed: int, worker: int, step: int) -> tuple[Tensor, Tensor]:
            return sample(train, batch_size, generator(seed, worker, step))

        numbers = generator(0)
        fixed = [sample(validation, 32, numbers) for _ in range(20)]

        def bits_per_byte(model: nn.Module) -> float:
            with torch.no_grad():
                losses = [F.cross_entropy(model(x), y).item() for x, y in fixed]
            return sum(losses) / len(losses) / math.log(2)

        return Task(
            name="gpt-adamw" if adamw else "gpt-sgd",
            build=gpt_small,
            batch=batch,
            evaluate=bits_per_byte,
            metric="validation bits per byte",
            optimizer=_adamw if adamw else _sgd,
            learning_rate=cosine(steps, peak, warmup=30),
            momentum=0.9,
            max_norm=1.0,
            steps=steps,
            facts={
                "data": f"top-level modules of the standard library of Python {platform.python_version()}: "
                f"{len(text)} bytes, CRC-32 {zlib.crc32(text):08x}; the first 90 % to train with",
                "batch_size": batch_size,
                "optimizer": ("AdamW, beta2 0.95, weight decay 0.01" if adamw else "SGD")
                + f", learning rate {peak}: 30 steps of warm-up, cosine to 0",
            },
        )

    return make


# ---- CIFAR-10

CIFAR10_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10_TEST = "test_batch"
_CIFAR10_MEAN, _CIFAR10_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class _BatchUnpickler(pickle.Unpickler):
    """Builds arrays of numpy and plain values: a file from elsewhere must not run code."""

    _reconstruct = np.empty(0).__reduce__()[0]
    _allowed = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None


def _cifar10_batch(path: Path) -> tuple[Tensor, Tensor]:
    try:
        content = _BatchUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # a malformed pickle raises anything
        raise ValueError(f"{path}: expected a pickled batch of CIFAR-10, found none: {error!r}") from error
    if not isinstance(content, dict) or not {b"data", b"labels"} <= content.keys():
        found = sorted(content, key=repr) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected a dictionary with the keys b'data' and b'labels', found {found}")
    images, labels = content[b"data"], content[b"labels"]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"{path}: expected b'data' to be uint8 (images, 3072), found {found}")
    if not isinstance(labels, list) or len(labels) != len(images):
        found = f"{len(labels)} of them" if isinstance(labels, list) else type(labels).__name__
        raise ValueError(f"{path}: expected b'labels' to be a list of {len(images)}, one for each image, found {found}")
    wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label <= 9]
    if wrong:
        raise ValueError(f"{path}: expected labels from 0 to 9, found {wrong[0]!r}")
    return torch.tensor(images).view(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64)


def load_cifar10(directory: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The published batches for Python, from the folder that their archive unpacks to.

    Returns
    -------
    Tensor, Tensor, Tensor, Tensor
        Images to train with, uint8 ``(n, 3, 32, 32)``, and their labels; images and labels to test.

    Raises
    ------
    FileNotFoundError
        The folder is not there, or not all of its files.
    ValueError
        A file is something else: which, what was expected and what was found.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected the folder cifar-10-batches-py of CIFAR-10, found no folder")
    names = [*CIFAR10_TRAIN, CIFAR10_TEST]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        found = ", ".join(sorted(entry.name for entry in directory.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(f"{directory}: expected {', '.join(names)}; {', '.join(missing)} missing, found {found}")
    parts = [_cifar10_batch(directory / name) for name in names]
    *train, test = parts
    return torch.cat([images for images, _ in train]), torch.cat([labels for _, labels in train]), *test


def augmented(images: Tensor, numbers: Generator) -> Tensor:
    """Crops of images ``(n, 3, 32, 32)`` after a margin of 4 zeros, half of them flipped, as is usual for CIFAR-10."""
    n = len(images)
    top, left = torch.randint(9, (2, n, 1), generator=numbers)
    flip = torch.randint(2, (n, 1), generator=numbers).bool()
    rows = top + torch.arange(32)
    columns = left + torch.where(flip, torch.arange(31, -1, -1), torch.arange(32))
    padded = F.pad(images, (4, 4, 4, 4))
    crops = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # channels come last
    return crops.permute(0, 3, 1, 2).contiguous()


def _normalized(images: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (_CIFAR10_MEAN, _CIFAR10_DEVIATION))
    return (images / 255 - mean) / deviation


def _cifar10(workers: int, steps: int | None, data: Path | None, batch_size: int = 256) -> Task:
    if data is None:
        raise ValueError("cifar10: expected --data DIR, the folder cifar-10-batches-py; nothing is downloaded")
    x, y, test_x, test_y = load_cifar10(data)
    epoch_steps = len(x) // (workers * batch_size)
    if not epoch_steps:
        raise ValueError(f"cifar10: expected at least {workers} x {batch_size} images to train with, found {len(x)}")
    steps = steps or 60 * epoch_steps

    def batch(seed: int, worker: int, step: int) -> tuple[Tensor, Tensor]:
        epoch, i = divmod(step, epoch_steps)
        order = torch.randperm(len(x), generator=generator(seed, epoch))  # the same for all workers: each takes its part
        chosen = order[(i * workers + worker) * batch_size :][:batch_size]
        return _normalized(augmented(x[chosen], generator(seed, worker, step))), y[chosen]

    return Task(
        name="cifar10",
        build=lambda: preact_resnet18(last_norm=False),
        batch=batch,
        evaluate=_accuracy(_normalized(test_x), test_y),
        metric="test accuracy",
        optimizer=_sgd,
        learning_rate=lambda step: 0.1 * 0.1 ** (step // epoch_steps // 20),
        momentum=0.0,
        max_norm=None,
        steps=steps,
        facts={
            "data": f"CIFAR-10: {len(x)} to train with, cropped and flipped, {len(test_x)} to test",
            "batch_size": batch_size,
            "optimizer": f"SGD, learning rate 0.1, a tenth of it after every 20 epochs of {epoch_steps} steps",
        },
    )


# ---- all


TASKS: dict[str, Callable[[int, int | None, Path | None], Task]] = {
    "digits": _digits,
    "gpt-sgd": _gpt(adamw=False),
    "gpt-adamw": _gpt(adamw=True),
    "cifar10": _cifar10,
}


def make(name: str, workers: int, steps: int | None = None, data: Path | None = None) -> Task:
    """A task for a number of workers.

    Parameters
    ----------
    name
        One of `TASKS`.
    workers
        They share the data of CIFAR-10; for the other tasks each draws from all.
    steps
        Of the training, to which schedules fit themselves. Default: the task's.
    data
        The folder of CIFAR-10.

    Raises
    ------
    ValueError, FileNotFoundError
        There is no such task, or no such data.
    """
    if name not in TASKS:
        raise ValueError(f"make: name must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name](workers, steps, data)
