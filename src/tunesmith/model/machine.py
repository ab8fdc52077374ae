"""The machine: the one file that knows devices, ranks and threads.

In: the environment that torchrun sets, and what torch finds. Out: a Machine that the loop asks.
Must not know: models, data, objectives.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_NUMBERS = 16 * 2**20
"""Numbers summed over the ranks in one message: few messages, at most 64 MiB beside the gradients."""

_RANK_TIMEOUT = timedelta(minutes=10)

FOREST_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens of a micro-batch where the recipe leaves it open: enough to fill the arithmetic units, small in memory."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where this process computes, and its place among the processes that train together."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @classmethod
    def cpu(cls) -> Machine:
        """One process on the CPU, threads as they are."""
        return cls(torch.device("cpu"))

    @classmethod
    def detect(cls, threads: int = 0) -> Machine:
        """CUDA where there is one, else the CPU; joins the other ranks where torchrun started several.

        Sets torch's CPU threads: `threads`, or with 0 every core that this process may use.
        """
        torch.set_num_threads(threads or num_cores())
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if world_size > 1 and not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=_RANK_TIMEOUT)
        return cls(device, rank, world_size)

    @property
    def is_main(self) -> bool:
        """The one rank that writes files and speaks."""
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """Type of frozen weights and of the forward pass: bfloat16 where the card computes in it, else float32."""
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float32

    @property
    def forest_tokens(self) -> int:
        """Tokens of a micro-batch where the recipe leaves it open."""
        return FOREST_TOKENS.get(self.device.type, FOREST_TOKENS["cpu"])

    @property
    def threads(self) -> int:
        """CPU threads; another number rounds sums otherwise."""
        return torch.get_num_threads()

    def all_sum(self, tensor: Tensor) -> None:
        """Sum `tensor` over the ranks, in place, on each of them."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def all_sum_many(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place, a bucket of them a message; all of one type."""
        if self.world_size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers, on each of them."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.world_size > 1:
            dist.barrier()

    def memory_bytes(self) -> int:
        """Memory in use: the card's where there is one, else this process's resident set."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_reserved(self.device))
        return int(psutil.Process().memory_info().rss)

    @contextmanager
    def seeded(self, key: str) -> Iterator[None]:
        """Random draws inside depend on `key` alone; torch's generators are as before afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)
            yield


def peak_bytes(device: torch.device) -> int:
    """Most memory that was in use at a time so far: the card's where it is one, else this process's resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(psutil.Process().cpu_affinity()) if psutil.LINUX else os.cpu_count() or 1


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > _BUCKET_NUMBERS:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
