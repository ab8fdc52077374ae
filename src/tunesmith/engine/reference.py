"""The reference: the log-probs of a stage's rows under the policy at the stage's start, computed once.

In: an engine whose model is that policy, trees, and a fingerprint of its weights. Out: one float32 array a tree.
Cached by content in the user's cache folder, so a sweep over beta and learning rate pays once.
Must not know: objectives, stages, recipes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tunesmith.data.store import Chosen
from tunesmith.data.types import Tree
from tunesmith.engine.engine import VERSION, Engine
from tunesmith.engine.reference_parts import FloatArray, Parts
from tunesmith.engine.scoring import agree, score
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import adapter_is_identity, without_adapter
from tunesmith.runs.atomic import write_bytes


def default_cache_folder() -> Path:
    """`tunesmith/reference` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tunesmith" / "reference"


def cache_key(engine: Engine, shas: Iterable[str], *, fingerprint: str) -> str:
    """sha256 over everything that the numbers depend on: weights, trees (by `shas`), dtype, backend, engine version.

    How trees were packed is not among it: that moves a log-prob by rounding only.
    """
    digest = hashlib.sha256()
    for part in (fingerprint, str(engine.dtype), str(engine.model.device.type), engine.backend, str(VERSION)):
        digest.update(part.encode() + b"\0")
    for sha in sorted(set(shas)):
        digest.update(sha.encode())
    return digest.hexdigest()


def pass_key(key: str, shas: Sequence[str], *, forest_tokens: int) -> str:
    """sha256 over what a pass's bits depend on besides: how its trees are packed, and the threads that sum."""
    digest = hashlib.sha256(f"{key} {forest_tokens} {torch.get_num_threads()}".encode())
    for sha in shas:
        digest.update(sha.encode())
    return digest.hexdigest()


def reference_logprobs(
    engine: Engine,
    trees: Sequence[Tree],
    *,
    forest_tokens: int,
    fingerprint: str,
    cache_folder: Path | None = None,
    progress: Callable[[int], None] | None = None,
    tell: Callable[[str], None] = lambda text: None,
    between: Callable[[], None] = lambda: None,
) -> tuple[list[FloatArray], bool]:
    """The reference of `trees`, and whether it came from the cache.

    A cached set is trusted only after 16 of its rows were recomputed and agreed; one that does not agree, or is
    damaged, is told and computed again. `cache_folder=None` computes without reading or writing. `between` is called
    between forests and may raise to stop: the cache keeps what is scored so far, and the next call goes on behind it,
    to the same bits. Trees with the same tokens are scored once. An adapter that changes nothing yet, as a new one, is
    left out of the pass; one that has been trained is part of the reference.
    """
    shas = [tree.sha() for tree in trees]
    first = dict(zip(reversed(shas), reversed(range(len(shas))), strict=True))  # of equal trees the first
    places = sorted(first.values())
    distinct = trees if len(places) == len(trees) else Chosen(trees, places)
    parts, path = None, None
    with without_adapter(engine.model) if adapter_is_identity(engine.model) else nullcontext():
        if cache_folder is not None:
            key = cache_key(engine, shas, fingerprint=fingerprint)
            path = cache_folder / f"{key}.safetensors"
            ordered = pass_key(key, [shas[place] for place in places], forest_tokens=forest_tokens)
            parts = Parts(cache_folder / f"{key}.parts", ordered, tell)
            cached = _cached(engine, trees, shas, path=path, forest_tokens=forest_tokens, tell=tell)
            if cached is not None:
                parts.remove()
                return cached, True
        values = score(
            engine,
            distinct,
            forest_tokens=forest_tokens,
            progress=progress,
            tell=tell,
            between=between,
            parts=parts,
        )
    by_sha = {shas[place]: value for place, value in zip(places, values, strict=True)}
    if path is not None and parts is not None and _write(path, by_sha, tell):
        parts.remove()
    return [by_sha[sha] for sha in shas], False


def _cached(
    engine: Engine,
    trees: Sequence[Tree],
    shas: Sequence[str],
    *,
    path: Path,
    forest_tokens: int,
    tell: Callable[[str], None],
) -> list[FloatArray] | None:
    """The cached log-probs; None where there are none, or they are damaged or do not agree, which is told."""
    try:
        found = _arrays(load(path.read_bytes()), path.stem, sorted(set(shas)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, SafetensorError):
        tell(f"reference: the cached log-probs in {path} are damaged; they are computed again")
        return None
    scores = [found[sha] for sha in shas]
    if agree(engine, trees, scores, forest_tokens=forest_tokens):
        return scores
    tell("reference: the cached log-probs do not agree with a recomputed sample; they are computed again")
    return None


def _arrays(arrays: Mapping[str, np.ndarray], key: str, shas: Sequence[str]) -> dict[str, FloatArray]:
    offsets = np.concatenate(([0], np.cumsum(arrays["lengths"])))
    values = arrays["logprobs"].astype(np.float32)
    if arrays["sha256"].tobytes() != _stamp(values) or len(offsets) != len(shas) + 1 or offsets[-1] != len(values):
        raise ValueError("altered")
    if "key" in arrays and arrays["key"].tobytes() != key.encode():  # files of the first releases do not say it
        raise ValueError("another's")
    return {sha: values[offsets[number] : offsets[number + 1]] for number, sha in enumerate(shas)}


def _write(path: Path, by_sha: Mapping[str, FloatArray], tell: Callable[[str], None]) -> bool:
    """Publish the whole; False where the disk refuses, which costs later runs the time and this one nothing."""
    ordered = [by_sha[sha] for sha in sorted(by_sha)]
    values = np.concatenate([*ordered, np.zeros(0, np.float32)])
    content = {
        "logprobs": values,
        "lengths": np.array([len(each) for each in ordered], np.int64),
        "sha256": np.frombuffer(_stamp(values), np.uint8),
        "key": np.frombuffer(path.stem.encode(), np.uint8),
    }
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_bytes(path, save(content))
    except (OSError, TunesmithError) as error:
        tell(f"reference: the log-probs cannot be cached for later runs: {error}")
        return False
    return True


def _stamp(values: FloatArray) -> bytes:
    return hashlib.sha256(values.tobytes()).digest()
