"""The models that the benchmarks train, each with synthetic batches that suit it. The loss is always cross entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

Batch = Callable[[int, Generator], tuple[Tensor, Tensor]]
"""``batch(batch_size, generator)`` gives input and target."""


def mlp(width: int = 3072) -> nn.Module:
    """Three square layers: 28.3 million parameters with little arithmetic each, the worst case for communication."""
    return nn.Sequential(
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
    )


def digits_classifier() -> nn.Module:
    """For handwritten digits of 8 x 8 pixels: 0.3 million parameters, all matrices large enough to be compressed."""
    return nn.Sequential(
        nn.Linear(64, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def digits_cnn() -> nn.Module:
    """For the same digits: convolutions with BatchNorm, 0.11 million parameters, all but the first kernel compressed."""

    def convolution(channels_in: int, channels: int, stride: int = 1) -> list[nn.Module]:
        return [
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *convolution(1, 32),
        *convolution(32, 64),
        *convolution(64, 128, stride=2),
        nn.Flatten(),
        nn.Linear(128 * 4 * 4, 10),
    )


class _PreActBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same_shape = stride == 1 and channels_in == channels
        self.shortcut = None if same_shape else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        # A projection reads the activated input, as the branch does; the identity does not.
        skipped = x if self.shortcut is None else self.shortcut(active)
        return skipped + self.conv2(F.relu(self.norm2(self.conv1(active))))


def preact_resnet18(classes: int = 10, last_norm: bool = True) -> nn.Module:
    """The ResNet-18 with pre-activation (He et al. 2016, arXiv 1603.05027) for images of 32 x 32: 11.2 million parameters.

    Much arithmetic for each parameter. Batch statistics stay local: synchronizing them costs collectives that no
    gradient compression can save, and Horovod's own SyncBatchNorm needs a GPU.

    Parameters
    ----------
    classes
        To tell apart.
    last_norm
        Whether the last block is normalized and activated too. Tang et al. 2019 train a network without, as their
        11,171,146 parameters say.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1, bias=False)]
    channels_in = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_PreActBlock(channels_in, channels, stride), _PreActBlock(channels, channels, 1)]
        channels_in = channels
    layers += [nn.BatchNorm2d(512), nn.ReLU()] if last_norm else []
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
    return nn.Sequential(*layers)


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        # (batch, time, 3 * width) to three of (batch, heads, time, width / heads)
        q, k, v = self.to_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.to_out(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm2(x))


class GPT(nn.Module):
    """A byte-level language model: 3.3 million parameters by default.

    Parameters
    ----------
    width, layers, heads
        Of the transformer.
    context
        Bytes that it sees at most.
    """

    def __init__(self, width: int = 256, layers: int = 4, heads: int = 4, context: int = 128) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        nn.init.normal_(self.token.weight, std=0.02)  # torch's 1 would drown the positions
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, 256, time)`` of the next byte: classes second, where cross entropy expects them."""
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def gpt_small() -> nn.Module:
    """The `GPT` that `convergence.py` trains: 0.67 million parameters."""
    return GPT(width=128, layers=3, heads=4, context=64)


def gpt(context: int = 128) -> nn.Module:
    """The default `GPT`."""
    return GPT(context=context)


def _noise(shape: tuple[int, ...], classes: int) -> Batch:
    def batch(batch_size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        target = torch.randint(classes, (batch_size,), generator=generator)
        return torch.randn(batch_size, *shape, generator=generator), target

    return batch


def _text(context: int) -> Batch:
    def batch(batch_size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(256, (batch_size, context + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return batch


MODELS: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
    "mlp": (mlp, _noise((3072,), classes=3072)),
    "preact_resnet18": (preact_resnet18, _noise((3, 32, 32), classes=10)),
    "gpt": (gpt, _text(context=128)),
    "gpt-small": (gpt_small, _text(context=64)),
}


def make(name: str) -> tuple[nn.Module, Batch]:
    """A new model and the function that makes batches for it.

    Raises
    ------
    ValueError
        There is no model of that name.
    """
    if name not in MODELS:
        raise ValueError(f"make: name must be one of {', '.join(MODELS)}, got {name!r}")
    model, batch = MODELS[name]
    return model(), batch
