"""Proofs about fused kernels: where Liger's run, they give what the model's own modules give.

In: a device and the type that it computes in. Out: proofs, skipped where the kernels cannot be used.
Must not know: which modules they stand in for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tunesmith.errors import ModelError
from tunesmith.model.kernels import TOLERANCE, apply_kernels
from tunesmith.selftest.attention import name_of, values_and_gradients
from tunesmith.selftest.inputs import FAMILIES, mixed_trees, small_model
from tunesmith.selftest.proof import Proof, skipped, worst_gradient, worst_value


def kernel_proofs(device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
    """Every family of models in the device's own type, with the kernels and without."""
    for family in FAMILIES:
        name = f"liger, {family}, {name_of(dtype)}"
        model = small_model(family, device, dtype)
        own_N, own = values_and_gradients(model, "plain", mixed_trees())
        try:
            apply_kernels(model, "liger")
        except ModelError as problem:
            yield skipped(name, problem.what)
            continue
        found_N, found = values_and_gradients(model, "plain", mixed_trees())
        compared = "against the model's own modules"
        yield Proof(f"{name}: log-probs", compared, worst_value(found_N, own_N), TOLERANCE[dtype])
        yield Proof(f"{name}: gradient", compared, worst_gradient(found, own), TOLERANCE[dtype])
