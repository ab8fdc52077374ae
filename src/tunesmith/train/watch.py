"""A watch over a stage's curves: what looks wrong is said once, with its likely causes, while there is time to stop.

In: the records of the steps, and the trained weights. Out: lines for the person, and `warnings.jsonl` beside the
metrics. Must not know: engines, objectives, what is done about it.

A warning changes nothing by itself (`train/policy.py` reads the diagnoses). It is a function of the records and the
weights alone, so a resumed stage writes the same file as an unbroken one. Each kind is said once a stage; steps that
were left out are said each time.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.diagnosis.base import Diagnosis
from tunesmith.errors import TunesmithError
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Record, Records, Value, read_records, truncate_records
from tunesmith.train.diagnosing import Diagnosing
from tunesmith.train.optim import Trainable
from tunesmith.train.progress import Observer

RECENT_STEPS = 20
"""Steps whose median says what is usual: enough that one row does not move it, few enough to follow a falling loss."""
FEWEST_STEPS = 5
"""Steps before there is a usual."""
LOSS_FACTOR = 10.0
"""A loss this many times the usual is a spike; or one this many deviations (the robust kind) above it, and above the
highest of the recent ones by RISE_FACTOR (two kinds of rows in turn have a deviation of almost 0)."""
LOSS_NATS = 1.0
"""But never one that is less than this above the usual: where losses are small, a hard row is ten times the rest."""
NORM_FACTOR = 20.0
"""Gradient norms of small batches differ by a few times from step to step."""
RISE_FACTOR = 1.5
"""The usual loss has risen this much, and by LOSS_NATS, above its lowest: what does not come back is no spike."""
ZERO_NORM = 1e-6
"""What gradients of float32 leave that cancel (equal answers in a pair): about 1e-7 of a usual norm."""
ZERO_STEPS = 3
"""Updates in a row without any gradient; one or two can be rows that a method has nothing to learn from."""
MOVED_AFTER = 10
"""Updates after which every trained tensor has moved, if it ever will."""
_SHOWN = 10
_BLOCK_NUMBERS = 4 * 2**20
"""Weights that are widened to float64 at a time."""
_DEVIATION_OF_MAD = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the watch reads of a step's record; nan where it holds no number."""

    step: int
    loss: float
    norm: float
    learning_rate: float
    is_update: bool

    @classmethod
    def of(cls, record: Mapping[str, Value]) -> Figures:
        """The figures of a line of metrics.jsonl."""
        step = record["step"]
        assert isinstance(step, int)
        loss, norm, rate = (_number(record.get(key)) for key in ("loss", "grad_norm", "lr"))
        return cls(step, loss, norm, rate, record.get("skipped") is not True)


@dataclass(frozen=True, slots=True)
class Sign:
    """Something that looks wrong: what, in words, and what it may come from, the likeliest first."""

    text: str
    causes: tuple[str, ...]


def loss_spike(recent: Sequence[Figures]) -> Sign | None:
    """The last step's loss is far above the usual."""
    last, before = recent[-1], [one.loss for one in recent[:-1] if math.isfinite(one.loss)]
    if len(before) < FEWEST_STEPS or not math.isfinite(last.loss):
        return None
    usual = statistics.median(before)
    deviation = _DEVIATION_OF_MAD * statistics.median([abs(loss - usual) for loss in before])
    above = last.loss - usual
    is_outside = above > LOSS_FACTOR * deviation and last.loss > RISE_FACTOR * max(before)
    if above <= LOSS_NATS or not (last.loss > LOSS_FACTOR * usual or is_outside):
        return None
    text = f"the loss is {last.loss:.4g}, and was usually {usual:.4g} in the {len(before)} steps before"
    causes = (
        "rows unlike the others: look at this step's",
        "a learning rate that is too high: it comes back in later steps, or the loss stays up",
        "a warm-up that is too short (`warmup_fraction`), or no clipping (`max_grad_norm`)",
    )
    return Sign(text, causes)


def norm_spike(recent: Sequence[Figures]) -> Sign | None:
    """The last step's gradient is far longer than the usual one."""
    last, before = recent[-1], [one.norm for one in recent[:-1] if one.norm > 0 and math.isfinite(one.norm)]
    if len(before) < FEWEST_STEPS or not math.isfinite(last.norm):
        return None
    usual = statistics.median(before)
    if last.norm <= NORM_FACTOR * usual:
        return None
    text = f"the gradient norm is {last.norm:.4g}, and was usually {usual:.4g} in the {len(before)} steps before"
    causes = (
        "a row that contradicts what was learned (wrong label, swapped pair): look at this step's",
        "a learning rate that is too high",
        "a step with far fewer trained tokens than the others",
    )
    return Sign(text, causes)


def zero_gradient(recent: Sequence[Figures]) -> Sign | None:
    """Nothing has pulled at any weight for some updates."""
    last = [one for one in recent if one.is_update][-ZERO_STEPS:]
    if len(last) < ZERO_STEPS or not all(one.norm < ZERO_NORM for one in last):
        return None
    text = (
        f"the gradient was zero but for rounding (norm below {ZERO_NORM:g}) in {ZERO_STEPS} updates in a row: nothing "
        "is learned, and AdamW makes steps of the usual size out of the rounding"
    )
    causes = (
        "pairs whose answers are equal, or answers that the method has nothing to tell apart in",
        "a loss that is saturated: every answer is as likely as float32 can say",
        "the trained weights are not used in the forward pass (`tuning.target_modules`)",
    )
    return Sign(text, causes)


def zero_rate(recent: Sequence[Figures]) -> Sign | None:
    """An update with a learning rate of 0."""
    if not recent[-1].is_update or recent[-1].learning_rate != 0:
        return None
    causes = ("a `learning_rate` below what a float can hold", "a schedule that ends before the stage does")
    return Sign("the learning rate is 0: updates change nothing", causes)


SIGNS: dict[str, Callable[[Sequence[Figures]], Sign | None]] = {
    "loss spike": loss_spike,
    "gradient spike": norm_spike,
    "zero gradient": zero_gradient,
    "zero learning rate": zero_rate,
}
RISE, UNMOVED, HELDOUT, LEFT_OUT = "rising loss", "unmoved weights", "held-out loss", "left out"


@dataclass(slots=True)
class Watch:
    """One stage's watch. `writes`: this rank keeps the file. `start`: a fingerprint of each tensor at the start.
    `diagnosing`: what the curves as a whole show."""

    folder: StageFolder
    trainable: Trainable
    observer: Observer
    writes: bool
    start: Mapping[str, tuple[float, float]]
    records: Records = field(default_factory=Records)
    said: set[str] = field(default_factory=set)
    recent: deque[Figures] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS + 1))
    lowest: float = math.inf
    num_updates: int = 0
    diagnosing: Diagnosing | None = None

    def resume(self, step: int, *, is_last: bool = False) -> None:
        """Go on behind `step` (0: from the start): remember the steps' records, and cut off warnings after it."""
        if not self.writes:
            return
        for line in truncate_records(self.folder.warnings_path, step or -1):
            self._remember(str(line["kind"]), line["step"])
        records = read_records(self.folder.metrics_path)
        for record in records:
            self._take(Figures.of(record))
        if self.diagnosing is not None:
            for record in records:
                self.diagnosing.curves.metrics.add(record)
            for record in read_records(self.folder.eval_path):
                self.diagnosing.curves.evaluations.add(record)
            self.diagnosing.resume(is_last=is_last)

    def stepped(self, record: Mapping[str, Value], rows: Sequence[str], *, is_last: bool) -> None:
        """Look at a step that was taken, on these rows."""
        if not self.writes:
            return
        self._flush()
        figures = Figures.of(record)
        rise = self._take(figures)
        found = {kind: sign for kind, look in SIGNS.items() if (sign := look(list(self.recent)))}
        if rise:
            found[RISE] = rise
        if is_last or self.num_updates == MOVED_AFTER:
            unmoved = unmoved_weights(self.trainable, self.start, self.num_updates)
            found |= {UNMOVED: unmoved} if unmoved else {}
        for kind, sign in found.items():
            self._say(figures.step, kind, sign, rows)
        if self.diagnosing is not None:
            self._tell(self.diagnosing.stepped(record, is_last=is_last))

    def evaluated(self, record: Mapping[str, Value]) -> None:
        """Look at an evaluation."""
        step, loss = record["step"], record["loss"]
        assert isinstance(step, int)
        if self.writes and not math.isfinite(_number(loss)):
            causes = ("a held-out row that the model cannot compute, as the forward pass is (dtype)",)
            self._say(step, HELDOUT, Sign(f"the held-out loss is {loss}, which is no number", causes), ())
        if self.writes and self.diagnosing is not None:
            self._tell(self.diagnosing.evaluated(record))

    def left_out(self, step: int, text: str, rows: Sequence[str]) -> None:
        """A step without an update, by `on_nonfinite: skip`; said every time."""
        if self.writes:
            self.said.discard(LEFT_OUT)
            self._say(step, LEFT_OUT, Sign(text, ()), rows)

    def _take(self, figures: Figures) -> Sign | None:
        """Remember a step; the sign of a loss that rose and stayed up."""
        self.recent.append(figures)
        self.num_updates += figures.is_update
        losses = [one.loss for one in list(self.recent)[-RECENT_STEPS:] if math.isfinite(one.loss)]
        if len(losses) < RECENT_STEPS:
            return None
        usual = statistics.median(losses)
        self.lowest = min(self.lowest, usual)
        if usual <= max(RISE_FACTOR * self.lowest, self.lowest + LOSS_NATS):
            return None
        text = f"the loss has risen: usually {usual:.4g} in the last {RECENT_STEPS} steps, {self.lowest:.4g} before"
        return Sign(text, ("a learning rate that is too high", "no clipping (`max_grad_norm: 0`)"))

    def _say(self, step: int, kind: str, sign: Sign, rows: Sequence[str]) -> None:
        if kind in self.said:
            return
        self._remember(kind, step)
        causes = f". Possible causes: {'; '.join(sign.causes)}" if sign.causes else ""
        self.observer.noted(f"WARNING step {step}: {sign.text}{causes}")
        line: Record = {
            "step": step,
            "kind": kind,
            "text": sign.text,
            "causes": list(sign.causes),
            "rows": list(rows[:_SHOWN]),
            "num_rows": len(rows),
        }
        self.records.append(self.folder.warnings_path, line)
        self._flush()

    def _tell(self, found: Sequence[Diagnosis]) -> None:
        """Say the diagnoses that were not said before, each with its remedy."""
        for each in found:
            if each.name in self.said or self.said.intersection(each.told_by):
                continue
            self._remember(each.name, each.step)
            text = f"{each.name}: {each.evidence}"
            self.observer.noted(f"WARNING step {each.step}: {text}. Cause: {each.cause}. Remedy: {each.remedy}")
            line: Record = {"step": each.step, "kind": each.name, "severity": each.severity, "text": text}
            line |= {"causes": [each.cause], "remedy": each.remedy, "rows": [], "num_rows": 0}
            self.records.append(self.folder.warnings_path, line)
            self._flush()

    def _remember(self, kind: str, step: Value) -> None:
        self.said.add(kind)
        if self.diagnosing is not None and isinstance(step, int):
            self.diagnosing.curves.warnings.setdefault(kind, step)

    def _flush(self) -> None:
        """The next checkpoint counts on the lines; a disk that fails will say so when that one is saved."""
        with suppress(TunesmithError):
            self.records.flush(*([self.folder.warnings_path] if self.said else []))


def start_watch(
    folder: StageFolder,
    *,
    trainable: Trainable,
    observer: Observer,
    writes: bool,
    diagnosing: Diagnosing | None = None,
) -> Watch:
    """The watch of a stage whose model holds its starting weights; see Watch."""
    start = fingerprints(trainable) if writes else {}
    return Watch(folder, trainable, observer, writes, start, diagnosing=diagnosing)


def fingerprints(trainable: Trainable) -> dict[str, tuple[float, float]]:
    """Two sums of each tensor, in float64: a tensor that was updated has others, without a copy of it being kept."""
    with torch.no_grad():
        return {name: _fingerprint(parameter.flatten()) for name, parameter in trainable.items()}


def unmoved_weights(trainable: Trainable, start: Mapping[str, tuple[float, float]], num_updates: int) -> Sign | None:
    """Trained tensors that are as they were at the start (an adapter's second matrices: still 0)."""
    now = fingerprints(trainable)
    names = [name for name, found in now.items() if found == start[name]]
    if not names or not num_updates:
        return None
    adapters = [name for name in names if "lora_B" in name]
    all_of = sum("lora_B" in name for name in trainable)
    if adapters and len(adapters) == all_of:
        what = "the adapter has not moved: every lora_B is as it was"
    elif len(names) == len(trainable):
        what = "no trained tensor has moved"
    else:
        what = f"{len(names)} of {len(trainable)} trained tensors have not moved, the first is {names[0]}"
    causes = (
        "a learning rate too small for float32 to hold its updates",
        "gradients that are zero: parts of the model that these rows do not reach (experts), or an adapter on layers "
        "that the forward pass does not use",
        "gradient checkpointing, or another library's wrapper, that cuts the graph before the adapter",
    )
    return Sign(f"after {num_updates} updates {what}", causes)


def _fingerprint(flat: Tensor) -> tuple[float, float]:
    total = square = 0.0
    for part in flat.split(_BLOCK_NUMBERS):
        wide = part.double()
        total, square = total + float(wide.sum()), square + float(wide.square().sum())
    return total, square


def _number(value: Value) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
