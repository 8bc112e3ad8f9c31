"""One of two processes that share the gradients of a compiled model: see test_distributed.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tokenpass
from tests import tiny

PROCESSES = 2
IMAGES = 4
BUCKET_BYTES = 2**10
"""So few that a model has several buckets, and graphs."""


def model() -> nn.Module:
    torch.manual_seed(3)
    return tiny.encoder(depth=4)


def compiled(wrapped: nn.Module, keep: float) -> Any:
    method = tokenpass.HiPrune(keep=keep)
    backend = tokenpass.backend(method, inner="aot_eager", always_rewrite=True)
    return torch.compile(wrapped, backend=backend)


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def wrap(kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model())
    if kind == "split ddp":
        # others may not be smaller than the first
        dist._DEFAULT_FIRST_BUCKET_BYTES = BUCKET_BYTES  # type: ignore[attr-defined]
        return DistributedDataParallel(model(), bucket_cap_mb=BUCKET_BYTES / 2**20)
    wrapped = model()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    if kind == "fsdp blocks":
        for block in wrapped.get_submodule("blocks").children():
            fully_shard(block, mesh=mesh)
    fully_shard(wrapped, mesh=mesh)
    return wrapped


def gradients(kind: str, keep: float, rank: int) -> tuple[dict[str, torch.Tensor], bool]:
    """Of one step on this process's share of the images, and whether the model was rewritten."""
    torch.compiler.reset()
    wrapped = wrap(kind)
    fast = compiled(wrapped, keep)
    share = tiny.images(IMAGES).chunk(PROCESSES)[rank]
    fast(share).square().mean().backward()
    found = {
        name.removeprefix("module."): whole(parameter.grad)
        for name, parameter in wrapped.named_parameters()
        if parameter.grad is not None
    }
    return found, tokenpass.report(fast).converted


def main(rank: int, folder: Path, keep: float, kinds: list[str]) -> None:
    """All that process ``rank`` of the two has to do; the first writes down what they found."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    found = {kind: gradients(kind, keep, rank) for kind in kinds}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
