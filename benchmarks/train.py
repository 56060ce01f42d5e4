"""Trains a classifier of handwritten digits with each method, and compares accuracy, time and bytes.

Run it with ``horovodrun -np 2 python benchmarks/train.py``, or with plain python for one rank. The data are the 1797
digits that come with scikit-learn, so nothing is downloaded. Every method starts from the same weights and sees the
same batches; nothing but the exchange of gradients differs. It runs on the CPU: the model is too small for anything else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from common import HelpFormatter, new_file, positive, progress_bar, table, use_threads, write_json
from learning import constructor
from methods import NAMES, distribute, method_list, reduction
from models import digits_classifier
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

WARMUP_EPOCHS = 3
MOMENTUM = 0.9
SMOOTHING = 50
"""Steps over which losses are averaged before they are drawn."""


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description="Trains a classifier of handwritten digits with each method, and compares.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["none", "quantize-4", "sign-4.5%", "onebit", "topk"],
        metavar="METHOD",
        help=f"any of {', '.join(NAMES)}".replace("%", "%%"),
    )
    parser.add_argument("--epochs", type=positive(int), default=30, help="passes over the training data")
    parser.add_argument("--batch-size", type=positive(int), default=16, help="samples of one rank in a step")
    parser.add_argument("--lr", type=positive(float), default=0.005, help="learning rate for one rank, times the ranks")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the order of the data")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the results to FILE too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses into FILE, a PNG")
    args = parser.parse_args()
    args.methods = method_list(parser, "--methods", args.methods)
    return args


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Training and test set; the split is always the same."""
    pixels, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(pixels / 16, digits, test_size=450, random_state=0, stratify=digits)
    return tuple(  # type: ignore[return-value]
        TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor(y)) for x, y in ((train_x, train_y), (test_x, test_y))
    )


def mean_over_ranks(value: float, name: str) -> float:
    """The mean of a number of each rank."""
    return hvd.allreduce(torch.tensor(value, dtype=torch.float64), name=name).item()


def learning_rate(progress: float, epochs: int, lr: float) -> float:
    """Rises for the first epochs, then falls to zero, both linearly. Progress is in epochs."""
    warmup = min(WARMUP_EPOCHS, epochs / 2)
    return lr * min(progress / warmup, (epochs - progress) / (epochs - warmup))


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of the samples that the model gets right; each rank looks at its part of them."""
    x, y = data[hvd.rank() :: hvd.size()]
    with torch.no_grad():
        correct = (model(x).argmax(1) == y).sum()
    return hvd.allreduce(correct, name="correct", op=hvd.Sum).item() / len(data)


def train(method: str, args: argparse.Namespace, train_data: TensorDataset, test_data: TensorDataset) -> dict[str, Any]:
    """Trains a new model.

    Returns
    -------
    dict
        ``method``; ``test_accuracy``; ``loss``: mean over the last epoch; ``seconds_per_step``: median, of this rank;
        ``steps``; ``bytes_sent``: per step, by this rank; ``reduction``: how many times fewer than uncompressed;
        ``losses``: of every step, on this rank.
    """
    torch.manual_seed(args.seed)
    model = digits_classifier()
    # Signs come with momentum correction, in place of the optimizer's momentum, and with 5/3 of the learning rate: masking
    # forgets velocity, so that steps are smaller.
    corrected = method.startswith("sign-")
    peak = (5 / 3 if corrected else 1) * hvd.size() * args.lr
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.0 if corrected else MOMENTUM)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    training = distribute(method, model, optimizer)
    optimizer = training.optimizer
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    sampler = DistributedSampler(train_data, hvd.size(), hvd.rank(), seed=args.seed)
    batches = DataLoader(train_data, args.batch_size, sampler=sampler)

    def step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(training.model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    seconds: list[float] = []
    losses: list[float] = []
    for epoch in progress_bar(range(args.epochs), desc=method, unit="epoch", disable=hvd.rank() != 0):
        sampler.set_epoch(epoch)
        for i, (x, y) in enumerate(batches):
            progress = epoch + (i + 1) / len(batches)
            optimizer.param_groups[0]["lr"] = learning_rate(progress, args.epochs, peak)
            start = time.perf_counter()
            losses.append(step(x, y))
            seconds.append(time.perf_counter() - start)

    sent = training.bytes_sent()
    return {
        "method": method,
        "test_accuracy": accuracy(model, test_data),
        "loss": mean_over_ranks(statistics.fmean(losses[-len(batches) :]), "loss"),
        "seconds_per_step": statistics.median(seconds),
        "steps": len(seconds),
        "bytes_sent": sent,
        "reduction": reduction(sent, model),
        "losses": losses,
    }


def name(method: str) -> str:
    """What a user writes for a method."""
    return constructor(method + "-momentum-lr-1.67" * method.startswith("sign-"))


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses over steps, and over the bytes that this rank has sent."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True)
    for r in results:
        ends = range(SMOOTHING, r["steps"] + 1)
        smooth = [statistics.fmean(r["losses"][end - SMOOTHING : end]) for end in ends]
        for panel, each in zip(panels, (1, r["bytes_sent"] / 1e6), strict=True):
            if each:  # of one rank, and of noop, nothing is sent
                panel.plot([end * each for end in ends], smooth, linewidth=1, label=name(r["method"]))
    panels[0].set(xlabel="steps", ylabel=f"training loss, mean of {SMOOTHING} steps", yscale="log")
    panels[1].set(xlabel="megabytes sent by a rank", xscale="log")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def report(results: list[dict[str, Any]]) -> str:
    """The results as a table."""
    rows = [["method", "test accuracy", "loss", "seconds per step", "bytes sent per rank and step", "reduction"]]
    for r in results:
        fewer = "-" if r["reduction"] is None else f"{r['reduction']:.1f}x"
        rows.append(
            [
                name(r["method"]).partition(", learning")[0],
                f"{r['test_accuracy']:.2%}",
                f"{r['loss']:.5f}",
                f"{r['seconds_per_step']:.5f}",
                f"{r['bytes_sent']:,.0f}",
                fewer,
            ]
        )
    return table(rows)


def main() -> None:
    """Trains with one method after the other."""
    args = parse_arguments()
    hvd.init()
    use_threads()
    train_data, test_data = load_data()
    results = [train(method, args, train_data, test_data) for method in args.methods]
    if hvd.rank() == 0:
        print(report(results))
        if args.json:
            write_json(args.json, args, [{key: value for key, value in r.items() if key != "losses"} for r in results])
        if args.plot:
            draw(results, args.plot)
            print(f"losses over steps and over bytes: {args.plot}")


if __name__ == "__main__":
    main()
