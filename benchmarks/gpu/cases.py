"""What is measured, and in which order: the most important first, so that a short lease ends with the bars.

In: nothing. Out: jobs, each a case with its sides. Must not know: torch, how a side works.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.gpu.rows import Kind
from benchmarks.gpu.shapes import Quantization

SideKind = Literal["ours", "trl"]
Method = Literal["dpo", "sft"]


@dataclass(frozen=True)
class Side:
    """One competitor and its settings; what it does not use stays at its default.

    ours: attention, kernels, checkpointing, forest_tokens (0: both as the product's plan finds them), optimizer,
    compile. trl: batch (pairs a forward), checkpointing
    (`none` or `full`), precompute, liger, padding_free (SFT, with flash attention).
    """

    key: str
    kind: SideKind
    attention: str = "auto"
    kernels: str = "auto"
    checkpointing: str = "none"
    forest_tokens: int = 8192
    optimizer: str = "adamw"
    compile: bool = False
    batch: int = 4
    precompute: bool = False
    liger: bool = False
    padding_free: bool = False

    @property
    def name(self) -> str:
        """All its settings in words."""
        if self.kind == "ours":
            fixed = f"checkpointing {self.checkpointing}, {self.forest_tokens} tokens"
            said = [f"attention {self.attention}", fixed if self.forest_tokens else "planned"]
            said += ["compiled"] if self.compile else []
            said += [f"kernels {self.kernels}"] if self.kernels != "auto" else []
            said += [self.optimizer] if self.optimizer != "adamw" else []
            return "Tunesmith, " + ", ".join(said)
        said = [f"batch {self.batch}", f"checkpointing {'on' if self.checkpointing == 'full' else 'off'}"]
        said += ["reference precomputed"] if self.precompute else []
        said += ["Liger's layers"] if self.liger else []
        said += ["flash attention, nothing padded"] if self.padding_free else []
        return "TRL, " + ", ".join(said)


@dataclass(frozen=True)
class Case:
    """A method on a model. `sides` are all tried once; `default` and ours go on to the measured rounds, and of
    the other TRL sides the fastest."""

    key: str
    model: str
    method: Method
    quantization: Quantization
    rows: Kind
    sides: tuple[Side, ...]
    minutes: float  # what it is expected to take, whole
    pairs_per_step: int = 16
    timed_steps: int = 2  # of a round, after one untimed
    rounds: int = 3
    dtype: str = "bfloat16"
    bar_gib: float | None = None  # on the peak memory of the first side


@dataclass(frozen=True)
class Job:
    """`compare`: a case with competing sides; `memory`: its sides, one round each; `emulate`: ours in a 16 GB card
    of an older kind; `head`: alternatives for the log-probs."""

    key: str
    kind: Literal["compare", "memory", "emulate", "head"]
    minutes: float
    case: Case | None = None
    options: dict[str, Any] = field(default_factory=dict)


OURS = Side("ours", "ours", forest_tokens=0)
OURS_FIXED = Side("ours_fixed", "ours")
TRL_DEFAULT = Side("trl_default", "trl")
"""Batch 4 x 4 without checkpointing, the reference in the loop."""
CHECKPOINTED = Side("trl_checkpointed", "trl", checkpointing="full")
"""Stands for the default where that does not fit."""

DPO_SIDES = (
    OURS,
    OURS_FIXED,
    TRL_DEFAULT,
    CHECKPOINTED,
    Side("trl_batch4_liger", "trl", precompute=True, liger=True),
    Side("trl_batch2_liger", "trl", batch=2, precompute=True, liger=True),
    Side("trl_batch2_precomputed", "trl", batch=2, precompute=True),
)
SFT_SIDES = (
    OURS,
    TRL_DEFAULT,
    Side("trl_batch1", "trl", batch=1),
    Side("trl_batch4_liger", "trl", liger=True),
    Side("trl_padding_free", "trl", batch=16, padding_free=True),
)
FEW_DPO = (OURS, TRL_DEFAULT, CHECKPOINTED, Side("trl_batch2_liger", "trl", batch=2, precompute=True, liger=True))
FEW_SFT = (OURS, TRL_DEFAULT, Side("trl_batch1", "trl", batch=1))
SMALL = Side("ours_small", "ours", checkpointing="full", forest_tokens=1536)
"""Least memory: one tree of two rows at a time, every activation made again."""
SMALL_8BIT = Side("ours_small_8bit", "ours", checkpointing="full", forest_tokens=1536, optimizer="paged_adamw_8bit")
TRL_SMALL = Side("trl_small", "trl", batch=1, checkpointing="full", precompute=True)


def _compare(
    model: str,
    method: Method,
    quantization: Quantization,
    sides: tuple[Side, ...],
    minutes: float,
    rows: Kind = "mixed",
) -> Job:
    tuning = "nf4" if quantization == "nf4" else "lora"
    key = f"{method}-{tuning}-{model}" + ("" if rows == "mixed" else f"-{rows}")
    return Job(key, "compare", minutes, Case(key, model, method, quantization, rows, sides, minutes))


def _memory(
    model: str, quantization: Quantization, bar_gib: float, *, others: tuple[Side, ...] = (TRL_SMALL, SMALL_8BIT)
) -> Job:
    key = f"memory-{'nf4' if quantization == 'nf4' else 'lora'}-{model}"
    case = Case(key, model, "dpo", quantization, "row1024", (SMALL, *others), 1.5, 4, 1, 1, bar_gib=bar_gib)
    return Job(key, "memory", 1.2, case)


def _emulate(model: str) -> Job:
    key = f"t4-nf4-{model}"
    side = Side("ours_t4", "ours", attention="sdpa", kernels="torch", checkpointing="full", forest_tokens=1536)
    case = Case(key, model, "dpo", "nf4", "row1024", (side,), 1.0, 4, 2, 1, dtype="float16")
    return Job(key, "emulate", 1.2, case)


def _backends(model: str) -> Job:
    key = f"backends-dpo-lora-{model}"
    sides = tuple(Side(f"ours_{name}", "ours", attention=name) for name in ("varlen", "flex", "sdpa"))
    more = (
        Side("ours_full", "ours", checkpointing="full", forest_tokens=16_384),
        Side("ours_selective", "ours", checkpointing="selective", forest_tokens=16_384),
        Side("ours_torch_kernels", "ours", kernels="torch"),
        Side("ours_compiled", "ours", compile=True),
    )
    return Job(key, "memory", 4.0, Case(key, model, "dpo", "none", "mixed", (*sides, *more), 4.0))


JOBS = (
    _compare("llama-8b", "dpo", "none", DPO_SIDES, 8.0),
    _memory("qwen-14b", "nf4", 13.0),
    _memory("llama-8b", "nf4", 9.0),
    _memory("phi-2", "nf4", 5.0),
    _memory("llama-1b", "none", 5.0),
    _emulate("qwen-14b"),
    _emulate("phi-2"),
    Job("head", "head", 2.5),
    _backends("llama-8b"),
    _compare("llama-8b", "sft", "none", SFT_SIDES, 4.5),
    _compare("llama-8b", "dpo", "nf4", FEW_DPO, 4.5),
    _compare("llama-8b", "dpo", "none", FEW_DPO, 4.5, rows="long"),
    _compare("llama-1b", "dpo", "none", FEW_DPO, 2.5),
    _compare("qwen-7b", "dpo", "none", FEW_DPO, 4.5),
    _compare("qwen-14b", "dpo", "nf4", FEW_DPO, 6.0),
    _compare("phi-2", "dpo", "none", FEW_DPO, 3.0),
    _compare("llama-8b", "sft", "nf4", FEW_SFT, 4.0),
)


def as_json(case: Case, side: Side) -> dict[str, Any]:
    """What a worker is told."""
    return {"case": {**asdict(case), "sides": ()}, "side": asdict(side)}


def from_json(told: dict[str, Any]) -> tuple[Case, Side]:
    """What `as_json` wrote."""
    case = Case(**{**told["case"], "sides": ()})
    return case, Side(**told["side"])
