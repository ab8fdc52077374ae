"""The reference: the log-probs of a stage's rows under the policy at the stage's start, computed once.

In: an engine whose model is that policy, trees, and a fingerprint of its weights. Out: one float32 array a tree.
Cached by content in the user's cache folder, so a sweep over beta and learning rate pays once.
Must not know: objectives, stages, recipes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tunesmith.data.types import Tree
from tunesmith.engine.engine import VERSION, Engine
from tunesmith.engine.retry import Budget, with_retry
from tunesmith.errors import NumericsError
from tunesmith.model.adapters import adapter_is_identity, without_adapter
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
    tell: Callable[[str], None] | None = None,
) -> list[FloatArray]:
    """Log-probs of the trained tokens of every tree, in branch and token order, in eval mode.

    Where memory runs out it goes on in smaller forests from where it was, and tells. Raises NumericsError for
    log-probs that are not finite (an unfilled slot would stay NaN), ResourceError where an answer alone does not fit.
    """
    parts: dict[tuple[int, int | None], FloatArray] = {}

    def work(budget: Budget) -> None:
        left = [number for number in range(len(trees)) if not _is_scored(parts, number, trees[number])]
        for units in budget.plan([trees[number] for number in left]):
            keys = [(left[unit.index], unit.branch) for unit in units]
            values = _values(engine, [unit.tree for unit in units])
            parts.update(zip(keys, values, strict=True))
            if progress is not None:
                progress(sum(unit.branch in (None, 0) for unit in units))

    def lowered(budget: Budget, problem: str) -> None:
        if tell is not None:
            tell(f"memory ran out ({problem}); going on in {budget.described()}")

    was_training = engine.model.training
    engine.model.eval()
    try:
        device, budget = engine.model.device, Budget(forest_tokens)
        with_retry(work, trees, budget=budget, device=device, where="log-probs of the reference", lowered=lowered)
    finally:
        engine.model.train(was_training)
    scores = [_joined(parts, number, tree) for number, tree in enumerate(trees)]
    bad = [tree.id for tree, values in zip(trees, scores, strict=True) if not np.isfinite(values).all()]
    if bad:
        raise NumericsError(
            f"the reference's log-probs are not finite on {len(bad)} rows",
            where=", ".join(bad[:5]),
            remedy="check the model's weights and its dtype; float16 overflows on models trained in bfloat16",
        )
    return scores


def _values(engine: Engine, trees: Sequence[Tree]) -> list[FloatArray]:
    """Log-probs of each tree of one forest."""
    logprobs = engine.logprobs(trees)
    tree_N = logprobs.tree_B[logprobs.branch_N].cpu().numpy()
    values_N = logprobs.logprob_N.float().cpu().numpy()
    return [part.copy() for part in np.split(values_N, np.searchsorted(tree_N, np.arange(1, len(trees))))]


def _is_scored(parts: Mapping[tuple[int, int | None], FloatArray], number: int, tree: Tree) -> bool:
    return (number, None) in parts or all((number, branch) in parts for branch in range(len(tree.branches)))


def _joined(parts: Mapping[tuple[int, int | None], FloatArray], number: int, tree: Tree) -> FloatArray:
    whole = parts.get((number, None))
    if whole is not None:
        return whole
    unfilled = np.full(1, np.nan, np.float32)
    return np.concatenate([parts.get((number, branch), unfilled) for branch in range(len(tree.branches))])


def cache_key(engine: Engine, trees: Sequence[Tree], *, fingerprint: str) -> str:
    """sha256 over everything that the numbers depend on: weights, tokens, dtype, backend, engine version.

    How trees were packed is not among it: that moves a log-prob by rounding only.
    """
    digest = hashlib.sha256()
    for part in (fingerprint, str(engine.dtype), str(engine.model.device.type), engine.backend, str(VERSION)):
        digest.update(part.encode() + b"\0")
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
    tell: Callable[[str], None] | None = None,
) -> tuple[list[FloatArray], bool]:
    """The reference of `trees`, and whether it came from the cache.

    A cached set is trusted only after 16 of its rows were recomputed and agreed; a set that does not agree is
    computed again. `cache_folder=None` computes without reading or writing. An adapter that changes nothing yet, as a
    new one, is left out of the pass; one that has been trained is part of the reference.
    """
    shas = [tree.sha() for tree in trees]
    unique = sorted(set(shas))
    with without_adapter(engine.model) if adapter_is_identity(engine.model) else nullcontext():
        if cache_folder is None:
            return score(engine, trees, forest_tokens=forest_tokens, progress=progress, tell=tell), False
        path = cache_folder / f"{cache_key(engine, trees, fingerprint=fingerprint)}.safetensors"
        cached = _read(path, unique)
        if cached is not None:
            scores = [cached[sha] for sha in shas]
            limit = RECHECK_TOLERANCE if engine.dtype == torch.float32 else 5e-2
            if _recheck(engine, trees, scores, forest_tokens=forest_tokens) <= limit:
                return scores, True
        scores = score(engine, trees, forest_tokens=forest_tokens, progress=progress, tell=tell)
    _write(path, unique, dict(zip(shas, scores, strict=True)))
    return scores, False


def _write(path: Path, unique: Sequence[str], by_sha: Mapping[str, FloatArray]) -> None:
    values = np.concatenate([by_sha[sha] for sha in unique]) if unique else np.zeros(0, np.float32)
    content = {
        "logprobs": values,
        "lengths": np.array([len(by_sha[sha]) for sha in unique], np.int64),
        "sha256": np.frombuffer(hashlib.sha256(values.tobytes()).digest(), np.uint8),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(content))
