"""The self-test: all proofs, one after another.

In: a device and the type that it computes in. Out: every proof's record; none is left out in silence.
Must not know: how the records are shown, the command line.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tunesmith.selftest.attention import attention_proofs
from tunesmith.selftest.kernels import kernel_proofs
from tunesmith.selftest.precision import precision_proofs
from tunesmith.selftest.proof import Proof, broken
from tunesmith.selftest.quantized import quantized_proofs
from tunesmith.selftest.steps import (
    checkpointing_proofs,
    objective_proofs,
    prefix_proofs,
    repeat_proofs,
    split_proofs,
)

Proofs = Callable[[torch.device, torch.dtype], Iterator[Proof]]


@dataclass(frozen=True, slots=True)
class Chapter:
    """Proofs of one kind; `claim` completes "this machine shows that ..."."""

    title: str
    claim: str
    proofs: Proofs


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a chapter came to."""

    chapter: Chapter
    proofs: tuple[Proof, ...]
    seconds: float


CHAPTERS = (
    Chapter("log-probs", "log-probs are exact", precision_proofs),
    Chapter("objectives", "losses and gradients are the papers'", lambda device, _: objective_proofs(device)),
    Chapter("splits", "micro-batches cannot change a step", lambda device, _: split_proofs(device)),
    Chapter("sharing", "a shared prompt changes nothing", lambda device, _: prefix_proofs(device)),
    Chapter("attention", "every backend equals the model's own", attention_proofs),
    Chapter("kernels", "fused kernels equal the model's own modules", kernel_proofs),
    Chapter("checkpointing", "recomputation changes nothing", lambda device, _: checkpointing_proofs(device)),
    Chapter("repetition", "a step repeats bit for bit", lambda device, _: repeat_proofs(device)),
    Chapter("quantized", "a quantized base is its own reference", lambda device, _: quantized_proofs(device)),
)


def self_test(device: torch.device, dtype: torch.dtype) -> Iterator[Outcome]:
    """Run every chapter; one that breaks off keeps the proofs that it had, and the error as one that failed."""
    for chapter in CHAPTERS:
        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's, on kernels that are slow here: what counts is what they give
            proofs = tuple(_all_proofs(chapter, device, dtype))
        yield Outcome(chapter, proofs, time.monotonic() - start)


def _all_proofs(chapter: Chapter, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
    try:
        yield from chapter.proofs(device, dtype)
    except Exception as error:  # whatever it is: a proof that breaks off is one that failed
        yield broken(chapter.title, error)
