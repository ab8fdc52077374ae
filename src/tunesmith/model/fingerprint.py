"""What a model is, in one hash: its weights as they are in memory now, adapters included.

In: a model. Out: sha256. Must not know: where the weights came from. A reference is known by this hash, never by a
path: the weights in memory may have been trained since they were read.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_sha(model: nn.Module) -> str:
    """sha256 over every parameter and buffer: name, type, shape and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=False).items()):
        if not isinstance(tensor, torch.Tensor):
            continue  # quantization states that are not tensors are derived from those that are
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
