"""Ranks that share a GPU: what arrives of CUDA tensors has the bits of what arrives of the same tensors on the CPU."""

import horovod.torch as hvd
import torch

from ds_horovod import Cast, DoubleSqueeze, OneBit, Quantize, TopK, allreduce

hvd.init()
for codec in (OneBit(), Quantize(4), TopK(0.01), TopK(0.05, values="sign"), Cast()):
    own = {device: DoubleSqueeze(codec) for device in ("cpu", "cuda")}
    for step in range(4):
        value = torch.randn(100_003, generator=torch.Generator().manual_seed(10 * step + hvd.rank()))
        arrived = {
            device: allreduce(value.to(device), name=f"{codec}.{device}", compression=compression).cpu()
            for device, compression in own.items()
        }
        assert torch.equal(arrived["cuda"].view(torch.int32), arrived["cpu"].view(torch.int32)), f"{codec}, step {step}"
print("one gpu: ok")
hvd.shutdown()
