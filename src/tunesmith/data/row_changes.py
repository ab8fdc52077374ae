"""What has become of a stage's rows between two starts of a run.

In: the ledger of the run, and the ledger of the rows as they are now. Out: counts, and the first row that differs.
Must not know: run folders, tokenizers, what is done about it.

Rows are known by the hash of their content. A row that is gone and a new one in the same place are one changed row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tunesmith.data.diff import moved
from tunesmith.data.ledger import Ledger

COLUMNS = ("id", "sha", "stage", "split", "outcome", "tokens", "trained_tokens")
_Fate = tuple[str, str, int, int]


@dataclass(frozen=True, slots=True)
class RowChanges:
    """A stage's rows before and now. `reordered`: the fewest rows that must have moved; `otherwise`: rows whose text is
    the same and whose side, fate or tokens are not. `first` names the first row that differs, and how."""

    num_before: int
    num_after: int
    added: int
    removed: int
    changed: int
    reordered: int
    otherwise: int
    first: str

    def __str__(self) -> str:
        parts = {
            "added": self.added,
            "removed": self.removed,
            "changed": self.changed,
            "reordered": self.reordered,
            "used in another way (side, fate or tokens)": self.otherwise,
        }
        told = ", ".join(f"{count:,} {name}" for name, count in parts.items() if count) or "none of them changed"
        first = f"; the first: {self.first}" if self.first else ""
        return f"{self.num_before:,} rows before, {self.num_after:,} now: {told}{first}"


@dataclass(frozen=True, slots=True)
class _Rows:
    ids: list[str]
    shas: list[str]
    fates: list[_Fate]


def row_changes(before: Ledger, after: Ledger, *, stage: str) -> RowChanges:
    """Rows of `stage` that were added, removed, changed and moved from one ledger to the other."""
    old, new = _rows(before, stage), _rows(after, stage)
    same, gone, come = _matched(old, new)
    place_of = {new.ids[two]: two for two in come}
    changed = [(one, place_of[old.ids[one]]) for one in gone if old.ids[one] in place_of]
    taken_old, taken_new = {one for one, _ in changed}, {two for _, two in changed}
    removed = [one for one in gone if one not in taken_old]
    added = [two for two in come if two not in taken_new]
    reordered = moved(same)
    otherwise = [(one, two) for one, two in same if old.fates[one] != new.fates[two]]
    found = [
        *((one, f"{old.ids[one]} changed") for one, _ in changed[:1]),
        *((two, f"{new.ids[two]} was added") for two in added[:1]),
        *((one, f"{old.ids[one]} was removed") for one in removed[:1]),
        *((one, f"{old.ids[one]} is {new.ids[two]} now") for one, two in reordered[:1]),
        *((one, f"{old.ids[one]}: {_fate(old.fates[one])} -> {_fate(new.fates[two])}") for one, two in otherwise[:1]),
    ]
    return RowChanges(
        num_before=len(old.ids),
        num_after=len(new.ids),
        added=len(added),
        removed=len(removed),
        changed=len(changed),
        reordered=len(reordered),
        otherwise=len(otherwise),
        first=min(found, key=lambda pair: pair[0])[1] if found else "",
    )


def _rows(ledger: Ledger, stage: str) -> _Rows:
    rows = _Rows([], [], [])
    for table in ledger.tables():
        columns = [table[name].to_pylist() for name in COLUMNS]
        for id_, sha, named, split, outcome, tokens, trained in zip(*columns, strict=True):
            if named == stage:
                rows.ids.append(id_)
                rows.shas.append(sha)
                rows.fates.append((split, outcome, tokens, trained))
    return rows


def _matched(old: _Rows, new: _Rows) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Places of rows of equal content in both, copies one by one and first those of one id; what is left of either."""
    places: dict[str, list[int]] = {}
    for two, sha in enumerate(new.shas):
        places.setdefault(sha, []).append(two)
    same: list[tuple[int, int]] = []
    gone: list[int] = []
    for one, sha in enumerate(old.shas):
        free = places.get(sha)
        if not free:
            gone.append(one)
            continue
        same.append((one, free.pop(_first(free, new.ids, old.ids[one]))))
    come = sorted(two for free in places.values() for two in free)
    return same, gone, come


def _first(free: Iterable[int], ids: list[str], wanted: str) -> int:
    """The place in `free` of the copy that has the wanted id, else the first."""
    return next((number for number, two in enumerate(free) if ids[two] == wanted), 0)


def _fate(fate: _Fate) -> str:
    split, outcome, tokens, trained = fate
    return f"{split}, {outcome}, {tokens} tokens, {trained} of them trained"
