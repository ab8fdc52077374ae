"""The reference: the log-probs of a stage's rows under the policy at the stage's start, computed once.

In: an engine whose model is that policy, trees, and a fingerprint of its weights. Out: one float32 array a tree.
Cached by content in the user's cache folder, so a sweep over beta and learning rate pays once.
Must not know: objectives, stages, recipes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tunesmith.data.plan import plan_forests
from tunesmith.data.types import Tree
from tunesmith.engine.engine import VERSION, Engine
from tunesmith.errors import NumericsError
from tunesmith.runs.atomic import write_bytes

FloatArray = npt.NDArray[np.float32]
NUM_RECHECKED = 16
RECHECK_TOLERANCE = 1e-5
"""Relative difference allowed between a cached and a recomputed log-prob in float32."""


def default_cache_folder() -> Path:
    """`tunesmith/reference` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tunesmith" / "reference"


@torch.no_grad()
def score(
    engine: Engine,
    trees: Sequence[Tree],
    *,
    forest_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> list[FloatArray]:
    """Log-probs of the trained tokens of every tree, in branch and token order, in eval mode.

    An unfilled slot would stay NaN, and NaN is refused.
    """
    was_training = engine.model.training
    engine.model.eval()
    scores = [np.full(1, np.nan, np.float32) for _ in trees]
    try:
        for numbers in plan_forests(trees, forest_tokens):
            forest = [trees[number] for number in numbers]
            logprobs = engine.logprobs(forest)
            tree_N = logprobs.tree_B[logprobs.branch_N]
            values_N = logprobs.logprob_N.float()
            for place, number in enumerate(numbers):
                scores[number] = values_N[tree_N == place].cpu().numpy()
            if progress is not None:
                progress(len(numbers))
    finally:
        engine.model.train(was_training)
    filled = [values for values in scores if values is not None]
    if len(filled) != len(trees) or not all(np.isfinite(values).all() for values in filled):
        bad = [
            tree.id
            for tree, values in zip(trees, scores, strict=True)
            if values is None or not np.isfinite(values).all()
        ]
        raise NumericsError(
            f"the reference's log-probs are not finite on {len(bad)} rows",
            where=", ".join(bad[:5]),
            remedy="check the model's weights and its dtype; float16 overflows on models trained in bfloat16",
        )
    return filled


def cache_key(engine: Engine, trees: Sequence[Tree], *, fingerprint: str, forest_tokens: int) -> str:
    """sha256 over everything that the numbers depend on: weights, tokens, dtype, backend, engine version."""
    digest = hashlib.sha256()
    for part in (fingerprint, str(engine.model.dtype), str(engine.model.device.type), engine.backend, str(VERSION)):
        digest.update(part.encode() + b"\0")
    digest.update(str(forest_tokens).encode())
    for sha in sorted({tree.sha() for tree in trees}):
        digest.update(sha.encode())
    return digest.hexdigest()


def _read(path: Path, shas: Sequence[str]) -> dict[str, FloatArray] | None:
    """The cached arrays by tree hash; None where the file is absent or damaged (it is then made again)."""
    try:
        arrays = load(path.read_bytes())
        offsets = np.concatenate(([0], np.cumsum(arrays["lengths"])))
        values = arrays["logprobs"].astype(np.float32)
        stamp = hashlib.sha256(values.tobytes()).digest()
        if arrays["sha256"].tobytes() != stamp or len(offsets) != len(shas) + 1 or offsets[-1] != len(values):
            return None
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    return {sha: values[offsets[number] : offsets[number + 1]] for number, sha in enumerate(shas)}


def _recheck(engine: Engine, trees: Sequence[Tree], scores: Sequence[FloatArray], *, forest_tokens: int) -> float:
    """Recompute up to 16 rows of a cached set; the largest relative difference."""
    picked = np.random.default_rng(len(trees)).permutation(len(trees))[:NUM_RECHECKED]
    fresh = score(engine, [trees[number] for number in picked], forest_tokens=forest_tokens)
    worst = 0.0
    for number, values in zip(picked, fresh, strict=True):
        if len(values):
            worst = max(worst, float(np.abs(values - scores[number]).max() / max(1.0, float(np.abs(values).max()))))
    return worst


def reference_logprobs(
    engine: Engine,
    trees: Sequence[Tree],
    *,
    forest_tokens: int,
    fingerprint: str,
    cache_folder: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[FloatArray], bool]:
    """The reference of `trees`, and whether it came from the cache.

    A cached set is trusted only after 16 of its rows were recomputed and agreed; a set that does not agree is
    computed again. `cache_folder=None` computes without reading or writing.
    """
    shas = [tree.sha() for tree in trees]
    unique = sorted(set(shas))
    if cache_folder is None:
        return score(engine, trees, forest_tokens=forest_tokens, progress=progress), False
    path = (
        cache_folder / f"{cache_key(engine, trees, fingerprint=fingerprint, forest_tokens=forest_tokens)}.safetensors"
    )
    cached = _read(path, unique)
    if cached is not None:
        scores = [cached[sha] for sha in shas]
        limit = RECHECK_TOLERANCE if engine.model.dtype == torch.float32 else 5e-2
        if _recheck(engine, trees, scores, forest_tokens=forest_tokens) <= limit:
            return scores, True
    scores = score(engine, trees, forest_tokens=forest_tokens, progress=progress)
    by_sha = dict(zip(shas, scores, strict=True))
    values = np.concatenate([by_sha[sha] for sha in unique]) if unique else np.zeros(0, np.float32)
    content = {
        "logprobs": values,
        "lengths": np.array([len(by_sha[sha]) for sha in unique], np.int64),
        "sha256": np.frombuffer(hashlib.sha256(values.tobytes()).digest(), np.uint8),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(content))
    return scores, False
