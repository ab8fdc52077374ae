"""Results of single chunks on disk while a stage is prepared, so that a start that was killed is not begun again.

In: a folder that belongs to one entry of the cache, a task, the work on it. Out: the same result, computed or read.
Must not know: rows, what the work is, when the folder is removed.

A file is known by what the task holds, and the folder by everything else that the result depends on. It is not
fsynced: it carries its own hash, and one that is torn or altered is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tunesmith.data.formats import Feedback
from tunesmith.data.store import Packed
from tunesmith.data.types import BadRow
from tunesmith.data.worker import ChunkResult, Fates, Task
from tunesmith.runs.atomic import TEMPORARY

KEPT_BYTES = 32 * 2**20
"""Sources from this size on are kept chunk by chunk; a smaller one is prepared again in a second or two."""
FREE_FACTOR = 8
"""Nothing is kept where the disk has less than this times the source's bytes free: the entry itself comes first."""
SUFFIX = ".chunk"
_SHA_BYTES = 32


def kept(task: Task, *, work: Callable[[Task], ChunkResult], folder: Path, owner: int) -> ChunkResult:
    """The result of `work`: read where the folder has it whole, else computed and left there.

    `owner`: the process that prepares the stage; it stands in temporary names, so that it can remove them.
    A disk that refuses is no error here: only the time is lost.
    """
    if task.count_only:
        return work(task)
    path = folder / f"{task_sha(task)}{SUFFIX}"
    found = read_result(path)
    if found is not None:
        return found
    result = work(task)
    _write(path, _stamp(path, body := encoded(result)) + body, owner)
    return result


def num_kept(folder: Path) -> int:
    """Chunks that an earlier start left in the folder."""
    return sum(1 for _ in folder.glob(f"*{SUFFIX}")) if folder.is_dir() else 0


def remove_unfinished(folder: Path, owner: int) -> None:
    """Remove what workers of this process left half written."""
    for path in folder.glob(f"{TEMPORARY}{owner}-*"):
        path.unlink(missing_ok=True)


def task_sha(task: Task) -> str:
    """sha256 over the chunk's bytes and how it is read; sets are sorted, because their order differs by process."""
    plan = task.plan
    reading = (plan.format, plan.reason, plan.chat, plan.num_answers, sorted(plan.keys))
    content = (task.raw, task.source.model_dump_json(), reading, task.heldout_fraction, task.keep_examples, task.shape)
    return hashlib.sha256(repr(content).encode()).hexdigest()


def encoded(result: ChunkResult) -> bytes:
    """A result as bytes: arrays, and the rest as JSON among them."""
    packed, columns = result.packed, result.fates
    fates = {column.name: getattr(columns, column.name) for column in fields(columns)}  # asdict copies every cell
    fates["examples"] = [line.decode() for line in columns.examples]
    rest = {
        "fates": fates,
        "ids": packed.ids,
        "bad": [asdict(bad) for bad in result.bad],
        "stops": [asdict(bad) for bad in result.stops],
        "kinds": list(result.kinds.items()),
        "notices": list(result.notices.items()),
        "keys": sorted(result.keys),
        "num_joined": result.num_joined,
        "feedback": asdict(result.feedback),
    }
    arrays = {
        "tokens": packed.tokens,
        "trained": packed.trained,
        "edges": packed.edges,
        "num_edges": packed.num_edges,
        "shas": np.frombuffer(packed.shas, np.uint8),
        "figures": packed.figures,
        "rest": np.frombuffer(json.dumps(rest).encode(), np.uint8),
        **({} if packed.weights is None else {"weights": packed.weights}),
    }
    body: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return body


def read_result(path: Path) -> ChunkResult | None:
    """The result of a chunk's file; None where there is none, or it is not whole, or it is another's."""
    try:
        data = path.read_bytes()
        body = data[_SHA_BYTES:]
        return decoded(body) if data[:_SHA_BYTES] == _stamp(path, body) else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def decoded(body: bytes) -> ChunkResult:
    """The result that `encoded` made bytes of."""
    arrays = load(body)
    rest: dict[str, Any] = json.loads(arrays["rest"].tobytes())
    fates = Fates(**{**rest["fates"], "examples": [line.encode() for line in rest["fates"]["examples"]]})
    packed = Packed(
        tokens=arrays["tokens"],
        trained=arrays["trained"],
        edges=arrays["edges"],
        num_edges=arrays["num_edges"],
        ids=rest["ids"],
        shas=arrays["shas"].tobytes(),
        figures=arrays["figures"],
        weights=arrays.get("weights"),
    )
    return ChunkResult(
        fates=fates,
        packed=packed,
        bad=[BadRow(**row) for row in rest["bad"]],
        stops=[BadRow(**row) for row in rest["stops"]],
        kinds=Counter(dict(rest["kinds"])),
        notices=Counter(dict(rest["notices"])),
        keys=frozenset(rest["keys"]),
        num_joined=rest["num_joined"],
        feedback=Feedback(**rest["feedback"]),
    )


def _stamp(path: Path, body: bytes) -> bytes:
    """sha256 of a file's content and of the task that it is the result of, which its name says."""
    return hashlib.sha256(path.stem.encode() + body).digest()


def _write(path: Path, data: bytes, owner: int) -> None:
    temporary = path.with_name(f"{TEMPORARY}{owner}-{os.getpid()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
