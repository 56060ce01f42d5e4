"""Trains a classifier of handwritten digits with each method, and compares accuracy, time and bytes.

Run it with ``horovodrun -np 2 python benchmarks/train.py``, or with plain python for one rank. The data are the 1797
digits that come with scikit-learn, so nothing is downloaded. Every method starts from the same weights and sees the
same batches; nothing but the exchange of gradients differs. It runs on the CPU: the model is too small for anything else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from common import HelpFormatter, new_file, positive, progress_bar, table, use_threads, write_json
from methods import NAMES, distribute, method_list, reduction
from models import digits_classifier
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

WARMUP_EPOCHS = 3


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description="Trains a classifier of handwritten digits with each method, and compares.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["none", "onebit", "topk"],
        metavar="METHOD",
        help=f"any of {', '.join(NAMES)}".replace("%", "%%"),
    )
    parser.add_argument("--epochs", type=positive(int), default=30, help="passes over the training data")
    parser.add_argument("--batch-size", type=positive(int), default=16, help="samples of one rank in a step")
    parser.add_argument("--lr", type=positive(float), default=0.005, help="learning rate for one rank, times the ranks")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the order of the data")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the results to FILE too")
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
        ``steps``; ``bytes_sent``: per step, by this rank; ``reduction``: how many times fewer than uncompressed.
    """
    torch.manual_seed(args.seed)
    model = digits_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
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

    seconds, losses = [], []
    for epoch in progress_bar(range(args.epochs), desc=method, unit="epoch", disable=hvd.rank() != 0):
        sampler.set_epoch(epoch)
        losses.clear()
        for i, (x, y) in enumerate(batches):
            progress = epoch + (i + 1) / len(batches)
            optimizer.param_groups[0]["lr"] = learning_rate(progress, args.epochs, hvd.size() * args.lr)
            start = time.perf_counter()
            losses.append(step(x, y))
            seconds.append(time.perf_counter() - start)

    sent = training.bytes_sent()
    return {
        "method": method,
        "test_accuracy": accuracy(model, test_data),
        "loss": mean_over_ranks(statistics.fmean(losses), "loss"),
        "seconds_per_step": statistics.median(seconds),
        "steps": len(seconds),
        "bytes_sent": sent,
        "reduction": reduction(sent, model),
    }


def report(results: list[dict[str, Any]]) -> str:
    """The results as a table."""
    rows = [["method", "test accuracy", "loss", "seconds per step", "bytes sent per rank and step", "reduction"]]
    for r in results:
        fewer = "-" if r["reduction"] is None else f"{r['reduction']:.1f}x"
        rows.append(
            [
                r["method"],
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
            write_json(args.json, args, results)


if __name__ == "__main__":
    main()
