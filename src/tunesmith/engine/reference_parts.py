"""What a pass of the reference has scored so far, on disk, so that a killed one goes on where it stopped.

In: a folder in the cache, a key of everything that the pass depends on, log-probs by the place of their forest in
the plan. Out: files that are whole or absent, and what of them is whole. Must not know: trees, models.

A part is named by the sha256 of its bytes, so two processes that score the same never write over one another, and an
altered part is seen. Parts are a convenience: a disk that refuses them costs a line, never the pass.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tunesmith.engine.retry import Budget
from tunesmith.errors import TunesmithError
from tunesmith.runs.atomic import write_bytes

FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[np.int64]
PART_SECONDS = 30.0
"""Work between two parts: what a kill may cost. Writing one takes some milliseconds."""
KEPT_DAYS = 14
"""Parts that nobody has gone on with for so long are removed when others are begun."""
_OPEN = -1  # in a file: no limit


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a pass under one budget: `num_forests` of its plan were scored, all of them where it is None."""

    budget: Budget
    num_forests: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some forests of a pass: their `places` in its plan, and the log-probs of their units, end to end."""

    phases: tuple[Phase, ...]
    places: Array
    lengths: Array
    values: FloatArray


@dataclass(slots=True, eq=False)
class Parts:
    """The parts of one pass. `key`: of everything that its numbers depend on, the packing included."""

    folder: Path
    key: str
    tell: Callable[[str], None] = lambda text: None
    clock: Callable[[], float] = time.monotonic
    every_seconds: float = field(default_factory=lambda: PART_SECONDS)
    _pending: list[tuple[int, Sequence[FloatArray]]] = field(default_factory=list)
    _begun: float | None = None
    _refused: bool = False

    def read(self) -> list[Part]:
        """Every whole part of this pass. Damaged ones are removed and told; those of another packing are let be."""
        found, num_damaged = [], 0
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                part = self._read(path)
            except (OSError, ValueError, KeyError, IndexError, SafetensorError):
                num_damaged += 1
                _remove(path)
                continue
            if part is not None:
                found.append(part)
        if num_damaged:
            self.tell(f"reference: {num_damaged} damaged parts of an earlier pass are computed again")
        return found

    def add(self, place: int, values: Sequence[FloatArray], phases: Sequence[Phase]) -> None:
        """Another forest is scored; published with those before it when they are worth a file."""
        now = self.clock()
        if self._begun is None:
            self._begun = now
        self._pending.append((place, values))
        if now - self._begun >= self.every_seconds:
            self.publish(phases)

    def publish(self, phases: Sequence[Phase]) -> None:
        """Put on disk what is not there yet."""
        pending, self._pending, self._begun = self._pending, [], self.clock()
        if not pending or self._refused:
            return
        units = [values for _, each in pending for values in each]
        content: dict[str, np.ndarray] = {
            "key": _bytes(self.key),
            "phases": np.array([_numbers(phase) for phase in phases], np.int64),
            "places": np.array([place for place, _ in pending], np.int64),
            "lengths": np.array([len(values) for values in units], np.int64),
            "values": np.concatenate([*units, np.zeros(0, np.float32)]),
        }
        data = save(content)
        try:
            if not self.folder.is_dir():
                _clean(self.folder.parent)
                self.folder.mkdir(mode=0o700, parents=True)
            write_bytes(self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors", data)
        except (OSError, TunesmithError) as error:
            self._refused = True
            self.tell(f"reference: a killed pass would begin again, because its parts cannot be kept: {error}")

    def remove(self) -> None:
        """The whole is published, or its parts are not right."""
        self._pending = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, path: Path) -> Part | None:
        """A file's part; None where it belongs to another pass. Raises where it is damaged."""
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != path.stem:
            raise ValueError(path)
        arrays = load(data)
        if arrays["key"].tobytes() != self.key.encode():
            return None
        phases = tuple(_phase(*row) for row in arrays["phases"].tolist())
        return Part(phases, arrays["places"], arrays["lengths"], arrays["values"].astype(np.float32))


def _numbers(phase: Phase) -> tuple[int, int, int]:
    budget = phase.budget
    limit = _OPEN if budget.tree_tokens is None else budget.tree_tokens
    return budget.forest_tokens, limit, _OPEN if phase.num_forests is None else phase.num_forests


def _phase(forest_tokens: int, tree_tokens: int, num_forests: int) -> Phase:
    limit = None if tree_tokens == _OPEN else tree_tokens
    return Phase(Budget(forest_tokens, limit), None if num_forests == _OPEN else num_forests)


def _bytes(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        return  # a folder, or another process was faster: what lies there is not read in any case


def _clean(root: Path) -> None:
    """Parts of passes that nobody finished."""
    for folder in root.glob("*.parts"):
        try:
            if time.time() - folder.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(folder)
        except OSError:
            continue  # another process was faster
