"""What the README shows works as shown."""

import re
from pathlib import Path

import torch

from ds_horovod.in_process import Simulation
from ds_horovod.layout import pack
from ds_horovod.options import Options

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_options_can_be_constructed():
    (block,) = [block for block in BLOCKS if "server_compressor=NoCompression()" in block]
    lines = [line for line in block.splitlines() if line]
    assert sum(line.startswith("compression = ") for line in lines) == len(lines) - 1 >= 6
    namespace = {}
    exec(lines[0], namespace)
    for line in lines[1:]:
        exec(line, namespace)


def test_own_compressor_obeys_the_conservation_law():
    (block,) = [block for block in BLOCKS if "class EightBit" in block]
    namespace = {}
    exec(block, namespace)
    compressor = namespace["compression"].options.compressor
    layout = pack([70, 333], compressor.block, 3)
    simulation = Simulation(layout, Options(compressor), workers=3)
    torch.manual_seed(0)
    total, moved = 0.0, 0.0
    for _ in range(20):
        gradients = [[torch.randn(70), torch.randn(333)] for _ in range(3)]
        total = total + sum(torch.cat(g).double() for g in gradients) / 3
        simulation.step(gradients)
        assert all(torch.equal(torch.cat(g), torch.cat(gradients[0])) for g in gradients)
        moved = moved + torch.cat(gradients[0]).double()
    kept = sum(exchange.worker_error.double() for exchange in simulation.exchanges) / 3
    kept = kept + torch.cat([exchange.server_error for exchange in simulation.exchanges]).double()
    kept = torch.cat([kept[o : o + n] for o, n in zip(layout.offsets, layout.numels, strict=True)])
    assert kept.abs().max() > 0
    torch.testing.assert_close(total, moved + kept, rtol=0, atol=1e-5)
