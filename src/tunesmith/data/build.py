"""A stage's rows, chunk by chunk, onto the disk: every row's fate decided, its trees on their side.

In: results of workers, in order. Out: three stores of trees, the ledger, held-out examples, and figures to report.
Must not know: how rows are read or rendered, the cache, recipes beyond a stage's policies.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tunesmith.data.ledger import LedgerWriter, Outcome, Split, drop_rows
from tunesmith.data.mixing import drawn_rows, interleaved
from tunesmith.data.store import StoreWriter, take
from tunesmith.data.worker import ChunkResult

NUM_NAMED = 3  # rows named in a note, as a place to start looking
LEAKED = "held out as well: its copy on the held-out side is kept"
REPEATED = "repeats an earlier row"
UNDRAWN = "not drawn: beyond its source's weight"
Keys = npt.NDArray[np.uint64]


@dataclass(slots=True)
class SideFigures:
    """One side as it grows: what is written, what was dropped and why, how long its rows are."""

    split: Split
    writer: StoreWriter
    num_rows: int = 0
    num_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)  # kind of reason -> the first rows, `id: detail`
    too_long: list[int] = field(default_factory=list)
    lengths: list[npt.NDArray[np.int32]] = field(default_factory=list)
    content_keys: list[Keys] = field(default_factory=list)
    prompt_keys: list[Keys] = field(default_factory=list)

    def row_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of every row whose length is known, the over-long included."""
        return np.concatenate(self.lengths) if self.lengths else np.zeros(0, np.int32)


class StageBuild:
    """The files of one stage in the making."""

    def __init__(self, folder: Path, *, merge: bool) -> None:
        self.folder = folder
        self.sides: dict[Split, SideFigures] = {
            split: SideFigures(split, StoreWriter(folder / split)) for split in ("train", "heldout", "replay")
        }
        self._ledger = LedgerWriter(folder / "ledger.parquet")
        self._examples = (folder / "heldout.jsonl").open("wb")
        self._merge = merge
        self._seen: set[int] = set()
        self._heldout_keys: set[int] = set()
        self._heldout_ids: dict[int, str] = {}  # prompt key -> the first held-out row with it
        self._train_rows: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Keys, int]] = []
        self.num_merged = 0
        self.num_leaked = 0

    @property
    def num_rows(self) -> int:
        """Rows that are in the ledger."""
        return self._ledger.num_rows

    def add(self, result: ChunkResult, *, source: str, number: int, split: Split) -> None:
        """One chunk of the source with this number: its rows go to `split`, or to the held-out side."""
        fates = result.fates
        count = len(fates.ids)
        held = np.array(fates.heldout, np.bool_) if split == "train" else np.zeros(count, np.bool_)
        reasons = list(fates.reasons)
        if split == "train":
            self._refuse_repeats(result, held, reasons)
        kept = np.array([not reason for reason in reasons], np.bool_)
        outcomes = [self._outcome(reason, trimmed) for reason, trimmed in zip(reasons, fates.trimmed, strict=True)]
        self._write_ledger(result, source, split, held, reasons, outcomes)
        tree_kept, tree_held = np.repeat(kept, fates.num_trees), np.repeat(held, fates.num_trees)
        own, heldout = self.sides[split], self.sides["heldout"]
        for side, chosen in ((own, tree_kept & ~tree_held), (heldout, tree_kept & tree_held)):
            if chosen.any():
                side.writer.append(take(result.packed, chosen))
        self._account(own, result, ~held, kept, reasons)
        if held.any():
            self._account(heldout, result, held, kept, reasons)
        for place in np.flatnonzero(kept & (held | (split == "heldout"))).tolist():
            self._examples.write(fates.examples[place])
        if split == "train":
            places = np.flatnonzero(kept & ~held)
            trees = np.array(fates.num_trees, np.int64)[places]
            keys = np.array(fates.content_keys, np.uint64)[places]
            self._train_rows.append((places + self._ledger.num_rows - count, trees, keys, number))

    def _refuse_repeats(self, result: ChunkResult, held: npt.NDArray[np.bool_], reasons: list[str]) -> None:
        """Training rows that are held out as well, or repeat an earlier row where the recipe merges repetitions."""
        for place, key in enumerate(result.fates.content_keys):
            if reasons[place] or not key:
                continue
            if not held[place] and key in self._heldout_keys:
                reasons[place] = LEAKED
                self.num_leaked += 1
            elif self._merge and not held[place]:
                if key in self._seen:
                    reasons[place] = REPEATED
                    self.num_merged += 1
                self._seen.add(key)

    def _outcome(self, reason: str, trimmed: str) -> Outcome:
        if reason == REPEATED:
            return "merged"
        return "dropped" if reason else "trimmed" if trimmed else "kept"

    def _write_ledger(
        self,
        result: ChunkResult,
        source: str,
        split: Split,
        held: npt.NDArray[np.bool_],
        reasons: list[str],
        outcomes: list[Outcome],
    ) -> None:
        fates = result.fates
        lost = np.array([bool(reason) for reason in reasons], np.bool_)
        self._ledger.append(
            {
                "id": fates.ids,
                "sha": fates.shas,
                "stage": [""] * len(fates.ids),
                "split": ["heldout" if each else split for each in held],
                "source": [source] * len(fates.ids),
                "outcome": outcomes,
                "reason": [reason or trimmed for reason, trimmed in zip(reasons, fates.trimmed, strict=True)],
                "tokens": np.where(lost, 0, fates.tokens).tolist(),
                "prompt_tokens": np.where(lost, 0, fates.prompt_tokens).tolist(),
                "trained_tokens": np.where(lost, 0, fates.trained_tokens).tolist(),
            }
        )

    def _account(
        self,
        side: SideFigures,
        result: ChunkResult,
        rows: npt.NDArray[np.bool_],
        kept: npt.NDArray[np.bool_],
        reasons: list[str],
    ) -> None:
        fates = result.fates
        lengths = np.array(fates.lengths, np.int32)
        side.num_rows += int(rows.sum())
        side.num_kept += int((rows & kept).sum())
        side.lengths.append(lengths[rows & (lengths > 0)])
        side.content_keys.append(np.array(fates.content_keys, np.uint64)[rows & kept])
        side.prompt_keys.append(np.array(fates.prompt_keys, np.uint64)[rows & kept])
        for place in np.flatnonzero(rows & ~kept).tolist():
            if reasons[place] == REPEATED:
                continue  # merged, which is no loss
            kind, _, detail = reasons[place].partition(":")
            side.dropped[kind] += 1
            if kind.startswith("longer than"):
                side.too_long.append(int(lengths[place]))
            named = side.named.setdefault(kind, [])
            if len(named) < NUM_NAMED:
                named.append(f"{fates.ids[place]}:{detail}" if detail else fates.ids[place])
        if side.split == "heldout":
            for place in np.flatnonzero(rows & kept).tolist():
                self._heldout_ids.setdefault(fates.prompt_keys[place], fates.ids[place])

    def heldout_is_read(self) -> None:
        """The held-out sources are read: what stands there is not trained."""
        self._heldout_keys = {int(key) for keys in self.sides["heldout"].content_keys for key in keys}

    # --- the end

    def finish(self, weights: list[float] | None) -> None:
        """Closes every file; with weights (one a training source), rows beyond their source's share are left out."""
        self._ledger.close()
        self._examples.close()
        order = self._draw(weights) if weights else None
        for split, side in self.sides.items():
            side.writer.close(order if split == "train" else None)

    def abandon(self) -> None:
        """Closes the files of a build that failed."""
        self._ledger.close()
        self._examples.close()
        for side in self.sides.values():
            side.writer.abandon()

    def _draw(self, weights: list[float]) -> npt.NDArray[np.int64]:
        """The order of the trees that are drawn; the ledger says which rows are not."""
        places, trees, keys = (np.concatenate([part[column] for part in self._train_rows]) for column in (0, 1, 2))
        numbers = np.concatenate([np.full(len(part[0]), part[3]) for part in self._train_rows])
        drawn = drawn_rows(numbers, keys, weights)
        undrawn = np.zeros(self._ledger.num_rows, np.bool_)
        undrawn[places[~drawn]] = True
        drop_rows(self.folder / "ledger.parquet", undrawn, reason=UNDRAWN)
        side = self.sides["train"]
        side.num_kept = int(drawn.sum())
        if not drawn.all():
            side.dropped[UNDRAWN.partition(":")[0]] = int((~drawn).sum())
        side.content_keys, side.prompt_keys = [keys[drawn]], [np.concatenate(side.prompt_keys)[drawn]]
        first_tree = np.cumsum(trees) - trees
        rows = interleaved(numbers, drawn)
        pieces = [np.arange(first_tree[row], first_tree[row] + trees[row]) for row in rows.tolist()]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    # --- what is noticed over all rows

    def num_repeated(self) -> int:
        """Training rows that repeat an earlier one and are trained again."""
        keys = np.concatenate(self.sides["train"].content_keys or [np.zeros(0, np.uint64)])
        return len(keys) - len(np.unique(keys))

    def leaked_prompts(self) -> tuple[int, list[str]]:
        """Held-out rows whose prompt is also trained, with another answer: how many, and the first of them."""
        train = np.unique(np.concatenate(self.sides["train"].prompt_keys or [np.zeros(0, np.uint64)]))
        heldout = np.concatenate(self.sides["heldout"].prompt_keys or [np.zeros(0, np.uint64)])
        leaked = heldout[np.isin(heldout, train)]
        named = dict.fromkeys(self._heldout_ids[int(key)] for key in leaked[: 16 * NUM_NAMED])
        return len(leaked), list(named)[:NUM_NAMED]
