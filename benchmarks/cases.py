"""The cases of the benchmark: what is measured, on which sides, and the bars that the figures are held against.

In: the rows of a step. Out: plain tables. Must not know: processes, figures, how either side works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.workload import Task

Flat = Literal["off", "padding_free", "bfd"]


@dataclass(frozen=True)
class Setting:
    """How TRL is set. batch: rows (or pairs) a forward pass; the rest of a step is accumulated.

    flat: `padding_free` puts a batch end to end in one sequence, `bfd` packs all rows into sequences of
    `PACKED_TOKENS` (TRL's `packing=True`); both for SFT only, since DPOTrainer 1.16 has neither.
    """

    batch: int
    checkpointing: bool = False
    flat: Flat = "off"

    def text(self) -> str:
        """As `parse` reads it, and as the worker is told."""
        return f"batch={self.batch},checkpointing={'on' if self.checkpointing else 'off'},flat={self.flat}"

    @classmethod
    def parse(cls, text: str) -> Setting:
        """`batch=1,checkpointing=off`; raises ValueError for anything else."""
        values = dict(part.split("=", 1) for part in text.split(","))
        batch = int(values.pop("batch"))
        switch = values.pop("checkpointing", "off")
        flat = values.pop("flat", "off")
        if values or batch < 1 or switch not in ("on", "off") or flat not in ("off", "padding_free", "bfd"):
            raise ValueError(f"not a setting of TRL: {text}")
        return cls(batch, switch == "on", flat)  # type: ignore[arg-type]  # checked above

    def name(self, rows_per_step: int) -> str:
        """In words, every setting named."""
        if self.flat == "bfd":
            shape = f"packing bfd into {PACKED_TOKENS} tokens, batch {self.batch}"
        else:
            shape = f"batch {self.batch} x {rows_per_step // self.batch}"
            shape += ", padding-free" if self.flat == "padding_free" else ""
        return f"{shape}, checkpointing {'on' if self.checkpointing else 'off'}"


PACKED_TOKENS = 2048
"""TRL's `max_length` while packing: longer than every row, so that none is cut."""
BATCHES = (1, 2, 4, 8)
DEFAULT_BATCH = 4


def candidates(task: Task, *, rows_per_step: int, one_step: bool) -> list[Setting]:
    """The settings among which TRL's best is searched, the likeliest first (what comes later may be cut short).

    Packing deals rows of all steps into one sequence, so it does the same work only where there is one step.
    """
    batches = [batch for batch in BATCHES if rows_per_step % batch == 0]
    found = [Setting(batch) for batch in batches]
    if task.method == "sft":
        found += [Setting(batch, flat="padding_free") for batch in batches if batch > 1]
        found += [Setting(1, flat="bfd")] if one_step else []
    return found + [Setting(batch, checkpointing=True) for batch in batches]


@dataclass(frozen=True)
class Side:
    """One line of a case's table: who, how set, on which rows of the work folder."""

    key: str
    name: str
    who: Literal["tunesmith", "trl", "startup"] = "tunesmith"
    setting: Setting | None = None
    rows: str = "workload.json"


@dataclass(frozen=True)
class Case:
    """What is measured together. default: TRL's usual settings are a side; peer: TRL is measured at all."""

    key: str
    title: str
    task: Task
    default: bool = False
    peer: bool = True


CASES = {
    case.key: case
    for case in (
        Case("a", "DPO, LoRA, reference in the loop", Task("dpo", "lora", "loop"), default=True),
        Case("b", "DPO, LoRA, reference cached on both sides", Task("dpo", "lora", "cached")),
        Case("c", "SFT, LoRA, on the chosen answers", Task("sft", "lora"), default=True),
        Case("d", "DPO, full fine-tuning, reference in the loop", Task("dpo", "full", "loop")),
        Case("e", "long rows: SFT, LoRA, rows of one length", Task("sft", "lora"), peer=False),
        Case("f", "start-up of `tunesmith run`", Task("dpo", "lora", "cached"), peer=False),
    )
}
LONG, SHORT = 8192, 1024
"""Row lengths of case e, in tokens."""


def own_sides(case: Case) -> list[Side]:
    """The sides of a case that need no peer."""
    if case.key == "e":
        return [
            Side(f"rows_{length}", f"rows of {length:,} tokens", rows=f"rows_{length}.json") for length in (SHORT, LONG)
        ]
    if case.key == "f":
        return [Side("startup", "`tunesmith run`, caches warm", who="startup")]
    return [Side("tunesmith", "Tunesmith")]


def sides(case: Case, *, rows_per_step: int, best: Setting | None) -> list[Side]:
    """Ours first, then TRL as it is usually set, then TRL at its best."""
    found = own_sides(case)
    if case.default:
        usual = Setting(min(DEFAULT_BATCH, rows_per_step))
        found.append(Side("trl_default", f"TRL default: {usual.name(rows_per_step)}", "trl", usual))
    if case.peer:
        assert best is not None
        found.append(Side("trl_best", f"TRL best: {best.name(rows_per_step)}", "trl", best))
    return found


@dataclass(frozen=True)
class Bar:
    """A bound of issue 4's table on the median of a figure.

    what: speed (times as fast as `side`), memory (share of the peak RSS of `side`), gemm (share of the GEMM rate),
    long (cost a token, over the ratio of arithmetic), startup (seconds). Larger is better for speed and gemm.
    """

    case: str
    what: Literal["speed", "memory", "gemm", "long", "startup"]
    side: str
    bound: float
    aim: float

    @property
    def more_is_better(self) -> bool:
        """Whether the bound is a least or a most."""
        return self.what in ("speed", "gemm")


BARS = [
    Bar("a", "speed", "trl_default", 5.0, 8.0),
    Bar("a", "speed", "trl_best", 3.0, 5.0),
    Bar("b", "speed", "trl_best", 3.0, 5.0),
    Bar("c", "speed", "trl_default", 2.5, 4.0),
    Bar("c", "speed", "trl_best", 2.0, 3.0),
    Bar("d", "speed", "trl_best", 2.5, 4.0),
    Bar("a", "memory", "trl_default", 0.4, 0.3),
    Bar("c", "memory", "trl_default", 0.4, 0.3),
    *(Bar(key, "gemm", "tunesmith", 0.5, 0.65) for key in "abcd"),
    Bar("e", "long", "rows_8192", 1.5, 1.2),
    Bar("f", "startup", "startup", 10.0, 3.0),
]
