"""The doctor: what this machine has, what of Tunesmith that switches on and off, and what stands in the way.

In: the machine as it is. Out: facts with verdicts, and the self-test's report. Nothing is written, no network is asked.
Must not know: recipes, runs, the command line.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from tunesmith.data.cache import default_cache_folder as prepared_folder
from tunesmith.engine.backends import BY_SPEED, DeviceFacts, ModelFacts, obstacle
from tunesmith.engine.reference import default_cache_folder as reference_folder
from tunesmith.model.load import forward_dtype
from tunesmith.model.machine import num_cores
from tunesmith.model.memory import usable_bytes
from tunesmith.recipe.models import Model
from tunesmith.runs.disk import free_bytes
from tunesmith.selftest.report import SelfTestReport, progress_line
from tunesmith.selftest.run import Outcome, self_test
from tunesmith.version import VERSION

Verdict = Literal["ok", "note", "warning"]
GIB = 2**30
MARKS = {"ok": ("✓", "green"), "note": ("-", "dim"), "warning": ("!", "yellow")}

REQUIRED = ("torch", "transformers", "peft", "tokenizers", "safetensors")
OPTIONAL = {
    "bitsandbytes": "`quantization: nf4` and `int8`, 8-bit and paged optimizers, and lion",
    "schedulefree": "`optimizer: schedule_free`",
    "liger-kernel": "fused kernels for norms, positions and gates; the models' own layers run",
    "flash-attn": "soft-capped scores in the varlen backend; torch's own kernel does the rest",
    "triton": "the flex backend and `compile` on a card",
}
"""What the lack of a package switches off."""

FEW_GIB_DISK = 10.0
"""A run of a small model writes some GiB of checkpoints; below this even that is at risk."""
STALE_SECONDS = 15 * 60
"""No extension takes longer to build; a lock that is older belongs to a process that was killed, and what builds next
waits for it for ever."""
SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE")
TYPICAL_HEAD = 128
"""Size of a head in most models; whether a model's own fits, the run says."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing about the machine: in words, and in values for programs."""

    subject: str
    text: str
    verdict: Verdict = "ok"
    values: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """All facts; prints itself through rich."""

    facts: tuple[Fact, ...]

    def as_json(self) -> dict[str, object]:
        """Plain values, in order."""
        facts = [
            {"subject": fact.subject, "verdict": fact.verdict, "text": fact.text, "values": dict(fact.values or {})}
            for fact in self.facts
        ]
        return {"tunesmith": VERSION, "facts": facts}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table.grid(padding=(0, 2))
        for fact in self.facts:
            mark, colour = MARKS[fact.verdict]
            table.add_row(Text(mark, style=colour), Text(fact.subject, style="bold"), Text(fact.text))
        yield table


def examine(runs_folder: Path = Path("runs"), environment: Mapping[str, str] = os.environ) -> DoctorReport:
    """Everything that can be seen without training or asking the network."""
    facts = [
        Fact("tunesmith", f"{VERSION}, Python {platform.python_version()}, {platform.platform(terse=True)}"),
        *_devices(),
        _dtypes(torch_device()),
        *_backends(torch_device()),
        _threads(environment),
        _memory(),
        *_libraries(),
        _compiler(torch_device(), environment),
        *_disks(runs_folder),
        *_caches(),
        *stale_locks(extensions_folder(environment)),
        _hub(environment),
    ]
    return DoctorReport(tuple(facts))


def run_self_test(said: Callable[[str], None]) -> SelfTestReport:
    """Rerun the numerical proofs on the device that a run would take; `said` gets a line as each chapter ends."""
    device = torch_device()
    outcomes: list[Outcome] = []
    for number, outcome in enumerate(self_test(device, _own_dtype(device)), start=1):
        said(progress_line(number, outcome))
        outcomes.append(outcome)
    return SelfTestReport(tuple(outcomes))


def torch_device() -> torch.device:
    """Where a run on this machine would compute."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _own_dtype(device: torch.device) -> torch.dtype:
    return forward_dtype(Model(path="any"), device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _devices() -> Iterator[Fact]:
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        text = f"{card.name}, compute capability {card.major}.{card.minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB"
        values = {"name": card.name, "total_bytes": total, "free_bytes": free, "capability": [card.major, card.minor]}
        yield Fact(f"device cuda:{number}", f"{text} free", values=values)
    capability = torch.backends.cpu.get_cpu_capability()
    yield Fact("device cpu", f"{platform.machine()}, {capability}", values={"capability": capability})
    if not torch.cuda.is_available() and torch.backends.mps.is_available():
        yield Fact("device mps", "an Apple card is here, and not used yet: runs take the CPU", "note")


def _dtypes(device: torch.device) -> Fact:
    own = _name(_own_dtype(device))
    if device.type != "cuda":
        text = f"runs compute in {own}; bfloat16 and float16 work on a CPU and are slow there"
        return Fact("types", text, values={"own": own})
    real = torch.cuda.is_bf16_supported(including_emulation=False)
    bfloat16 = "real" if real else "emulated, so not used"
    text = f"runs compute in {own}; bfloat16 is {bfloat16}; float16 {'works' if real else 'runs with a loss scale'}"
    return Fact("types", text, values={"own": own, "bfloat16": real})


def _backends(device: torch.device) -> Iterator[Fact]:
    """Every attention backend for a model of usual shape, trained in the device's own type."""
    facts, model = DeviceFacts.of(device), ModelFacts(_own_dtype(device), TYPICAL_HEAD)
    for kernel in BY_SPEED:
        reason = obstacle(kernel, facts, model)
        text = reason or "can be used; every run checks it on its own model and rows"
        yield Fact(f"attention {kernel}", text, "note" if reason else "ok", {"usable": not reason})


def _threads(environment: Mapping[str, str]) -> Fact:
    cores, there = num_cores(), os.cpu_count() or 1
    asked = environment.get("OMP_NUM_THREADS")
    text = f"{cores} cores for this process of {there}; a run takes all of them unless `threads` says otherwise"
    text += f"; OMP_NUM_THREADS is {asked}" if asked else ""
    return Fact("cores", text, values={"cores": cores, "present": there, "threads": torch.get_num_threads()})


def _memory() -> Fact:
    total, available = psutil.virtual_memory().total, usable_bytes(torch.device("cpu"))
    text = f"{available / GIB:.1f} of {total / GIB:.1f} GiB free"
    return Fact("memory", text, values={"total_bytes": total, "available_bytes": available})


def installed(package: str) -> str | None:
    """A distribution's version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _libraries() -> Iterator[Fact]:
    versions = {name: installed(name) for name in REQUIRED}
    cuda = f", built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
    yield Fact("libraries", ", ".join(f"{name} {found}" for name, found in versions.items()) + cuda, values=versions)
    for name, what in OPTIONAL.items():
        found = installed(name)
        if found is None:
            yield Fact(name, f"not installed, so without {what}", "note", {"version": None})
        else:
            yield Fact(name, found, values={"version": found})


def _compiler(device: torch.device, environment: Mapping[str, str]) -> Fact:
    """torch.compile writes C++ for a CPU; on a card Triton builds its launcher with a C compiler."""
    named = environment.get("CXX" if device.type == "cpu" else "CC")
    usual = ("c++", "g++", "clang++") if device.type == "cpu" else ("cc", "gcc", "clang")
    found = next((path for name in (named, *usual) if name and (path := shutil.which(name))), None)
    if found is None:
        return Fact("compiler", f"none ({', '.join(usual)}), so without `compile`", "note", {"path": None})
    return Fact("compiler", f"{found}, for `compile`", values={"path": found})


def _disks(runs_folder: Path) -> Iterator[Fact]:
    for subject, folder in (("disk runs", runs_folder), ("disk caches", reference_folder().parent)):
        free = free_bytes(folder.absolute())
        few = free < FEW_GIB_DISK * GIB
        text = f"{free / GIB:.1f} GiB free in {folder.absolute()}" + (", little for checkpoints" if few else "")
        yield Fact(subject, text, "warning" if few else "ok", {"path": str(folder.absolute()), "free_bytes": free})


def _caches() -> Iterator[Fact]:
    for subject, folder in (("cache rows", prepared_folder()), ("cache reference", reference_folder())):
        count, size = entries_and_bytes(folder)
        text = f"{count:,} entries, {size / GIB:.2f} GiB in {folder}; may be deleted at any time"
        yield Fact(subject, text if count else f"empty, {folder}", values={"entries": count, "bytes": size})


def entries_and_bytes(folder: Path) -> tuple[int, int]:
    """Entries of a cache folder, and the bytes of all files in it; what vanishes meanwhile counts for nothing."""
    if not folder.is_dir():
        return 0, 0
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # another process removed it
    return sum(1 for _ in folder.iterdir()), size


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Where torch builds extensions, as torch finds it."""
    named = environment.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    root = environment.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "torch_extensions"


def stale_locks(folder: Path) -> Sequence[Fact]:
    """A warning for every lock that a killed build left: the next one would wait for it without a word."""
    found = []
    for path in sorted(folder.rglob("lock")) if folder.is_dir() else []:
        try:
            age = time.time() - path.stat().st_mtime
        except OSError:
            continue  # its owner was done
        if age > STALE_SECONDS:
            text = f"left {age / 3600:.1f} hours ago; whatever builds it next hangs. Delete it: {path}"
            found.append(Fact("stale lock", text, "warning", {"path": str(path), "age_seconds": round(age)}))
    return found


def _hub(environment: Mapping[str, str]) -> Fact:
    """Whether downloads are switched off, and where they would go; the network is not asked."""
    given = {name: environment[name] for name in SWITCHES if environment.get(name)}
    offline = any(given.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in SWITCHES[:3])
    state = "offline: only what is on disk" if offline else "online: ids are downloaded when they are first used"
    said = "".join(f"; {name}={value}" for name, value in given.items())
    return Fact("hub", state + said, values={"offline": offline, **given})
