"""Every method on real preferences: 100 steps each with two real small models, curves kept, one table.

    python -m benchmarks.methods.real                 run all, compare with the kept curves, print the table
    python -m benchmarks.methods.real --write         run all, keep the curves and the table's figures
    python -m benchmarks.methods.real --table         print the table of the kept figures

In: `../shared/data` (pairs of LLMs-from-scratch, KTO's labels of LLaMA-Factory, stories260K) and the embedded model.
Out: `tests/golden/real/*.json`, one a model: losses step by step, held-out figures, seconds, memory.
Each case runs in a process of its own, on one thread, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
KEPT = ROOT / "tests" / "golden" / "real"
PAIRS = SHARED / "pref" / "alpaca_style_preference_1100.json"
LABELS = SHARED / "pref" / "kto_en_demo.json"
MODELS = {"stories260K": str(SHARED / "models" / "stories260K"), "embedded": "embedded:quickstart/model"}
NUM_STEPS = 100
TOLERANCE = 1e-6
"""Relative, of every loss, in float32 on one thread."""


@dataclass(frozen=True)
class Case:
    """A method with what differs from the usual settings; `rows` says what its file holds.

    after_sft: it starts from 100 steps of SFT on the chosen answers.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: str = "pairs"
    note: str = ""
    after_sft: bool = False

    @property
    def name(self) -> str:
        """The method, and what was set."""
        return f"{self.method}, {self.note}" if self.note else self.method


CASES = [
    Case("sft", rows="answers"),
    Case("sft", {"label_smoothing": 0.1}, rows="answers", note="label smoothing"),
    Case("sft", {"neftune_alpha": 5.0}, rows="answers", note="NEFTune"),
    Case("completion", rows="text"),
    Case("dpo"),
    Case("dpo", {"label_smoothing": 0.1}, note="label smoothing"),
    Case("dpo", {"divergence": "forward_kl"}, note="forward KL"),
    Case("dpo", {"divergence": "jensen_shannon"}, note="Jensen-Shannon"),
    Case("dpo", {"divergence": "alpha"}, note="alpha divergence"),
    Case("dpo", {"length_desensitization": 0.5}, note="LD-DPO"),
    # WPO weighs a pair by how likely the policy is to write it: a base that never would leaves it nothing to learn from
    Case("dpo", {"weighting": "wpo"}, note="WPO after SFT", after_sft=True),
    Case("dpo", {"sft_weight": 1.0}, note="RPO"),
    Case("dpo", {"reference_update": {"every": 16}}, note="TR-DPO"),
    Case("robust_dpo"),
    Case("hinge"),
    Case("ipo"),
    Case("ipo", {"normalization": "sum"}, note="summed"),
    Case("exo"),
    Case("nca"),
    Case("bco"),
    Case("sppo", {"beta": 0.01}),
    Case("aot"),
    Case("aot_unpaired"),
    Case("apo_zero"),
    Case("apo_down"),
    Case("discopop"),
    Case("sigmoid_norm"),
    Case("mixture"),
    Case("orpo", {"beta": 1.0}),
    Case("simpo"),
    Case("cpo"),
    Case("alphapo"),
    Case("kto", rows="labels"),
    Case("bco_unpaired"),
    Case("plackett_luce", rows="rankings"),
    Case("best_against_rest", rows="rankings"),
    Case("reward", {"learning_rate": 1e-3}),
]
BY_NAME = {case.name: case for case in CASES}


def recipe_of(case: Case, model: str, folder: Path, *, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """A recipe of one stage, from the base; rates are high because the models are tiny."""
    stage: dict[str, Any] = {
        "name": "stage",
        "method": case.method,
        "train": [{"path": str(rows_for(case.rows, folder))}],
        "heldout_fraction": 0.1,
        "max_length": 512,
        "epochs": 20,
        "max_steps": num_steps,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "save_every": 0,
        "eval_every": NUM_STEPS,
        "tuning": {"kind": "lora", "r": 8, "alpha": 16},
        "forest_tokens": 4096,
        **case.settings,
    }
    return {
        "name": "real",
        "model": {"path": MODELS[model], "chat_template": "plain", "dtype": "float32", "attention": "sdpa"},
        "stages": [*([_first(stage, folder)] if case.after_sft else []), stage],
        "runs_folder": str(folder / "runs"),
        "memory": "fixed",
        "threads": 1,
        "data_workers": 1,
    }


def _first(stage: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The SFT stage before."""
    keys = (
        "epochs",
        "batch_size",
        "learning_rate",
        "schedule",
        "warmup_fraction",
        "max_length",
        "tuning",
        "forest_tokens",
    )
    rows = [{"path": str(rows_for("answers", folder))}]
    return {
        "name": "first",
        "method": "sft",
        "train": rows,
        "max_steps": NUM_STEPS,
        **{key: stage[key] for key in keys},
    }


def rows_for(kind: str, folder: Path) -> Path:
    """The file of a kind of rows; those that are not there as such are made of the pairs."""
    if kind == "pairs":
        return PAIRS
    if kind == "labels":
        return LABELS
    pairs = json.loads(PAIRS.read_text())
    path = folder / f"{kind}.jsonl"
    if kind == "rankings":  # the chosen answer, its words in reverse, is the third, and the worst
        rows = [
            {
                "prompt": _prompt(row),
                "responses": [row["rejected"], row["chosen"], " ".join(reversed(row["chosen"].split()))],
                "scores": [1, 2, 0],
            }
            for row in pairs
        ]
    elif kind == "answers":
        rows = [{"prompt": _prompt(row), "completion": row["chosen"]} for row in pairs]
    else:
        rows = [{"text": f"{_prompt(row)}\n{row['chosen']}"} for row in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _prompt(row: Mapping[str, str]) -> str:
    return f"{row['instruction']}\n{row['input']}".strip()


def measured(case: Case, model: str, *, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """Run a case here: its losses, the held-out figures before and after, seconds of the steps."""
    import torch

    import tunesmith
    from tunesmith.runs.records import read_records

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = tunesmith.run(recipe_of(case, model, folder, num_steps=num_steps))
        stage = run / "stages" / "stage"
        steps = read_records(stage / "metrics.jsonl")
        before, after = read_records(stage / "eval.jsonl")[0], read_records(stage / "eval.jsonl")[-1]
        seconds = [record["seconds"] for record in read_records(stage / "timings.jsonl")]
    return {
        "loss": [record["loss"] for record in steps],
        "before": before,
        "after": after,
        "seconds": sum(value for value in seconds if isinstance(value, float)),
    }


def in_own_process(case: Case, model: str, *, num_steps: int = NUM_STEPS) -> dict[str, Any] | None:
    """The same in a child, with its peak memory; None where it failed, which has been printed."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        log = f"{file.name}.log"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
                result = measured(case, model, num_steps=num_steps)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                Path(file.name).write_text(json.dumps({**result, "peak_bytes": peak}))
                code = 0
            except BaseException:  # a child must not return into the parent's code
                traceback.print_exc()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        said = Path(log).read_text()
        Path(log).unlink()
        if status:
            print(said, file=sys.stderr)
        found: dict[str, Any] | None = json.loads(file.read()) if status == 0 else None
    return found


def faults(case: Case, found: Mapping[str, Any], kept: Mapping[str, Any] | None) -> list[str]:
    """What is not as it should be: the start, the held-out accuracy, the curve."""
    said = []
    before, after = found["before"], found["after"]
    if not all(map(math.isfinite, found["loss"])):
        said.append("a loss is not finite")
    if "logratio_chosen" in before and abs(before["margin"]) > 1e-5:
        said.append(f"the margin at step 0 is {before['margin']:.2g}")
    if "accuracy" in before and not after["accuracy"] > before["accuracy"]:
        said.append(f"held-out accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f}")
    if "accuracy" not in before and not after["loss"] < before["loss"]:
        said.append(f"held-out loss {before['loss']:.4f} -> {after['loss']:.4f}")
    if kept is not None and (distance := apart(found["loss"], kept["loss"])) > TOLERANCE:
        said.append(f"the curve is {distance:.1e} from the kept one")
    return said


def apart(found: Sequence[float], kept: Sequence[float]) -> float:
    """The largest difference of two curves, as far as the first goes, beside the larger of the loss and the curve."""
    scale = max(map(abs, kept))
    return max(abs(one - two) / scale for one, two in zip(found, kept, strict=False))


def table(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """The kept figures of a model as Markdown."""
    lines = [
        "| method | loss, step 1 -> 100 | held-out accuracy | margin | KL | seconds | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    usual = kept["dpo"]
    for name, found in kept.items():
        before, after = found["before"], found["after"]
        accuracy = f"{before['accuracy']:.3f} -> {after['accuracy']:.3f}" if "accuracy" in after else "-"
        margin = f"{after['margin']:+.3f}" if "margin" in after else "-"
        kl = f"{after['sample_kl']:.2f}" if "sample_kl" in after else "-"
        time = f"{found['seconds']:.1f} ({found['seconds'] / usual['seconds']:.2f})"
        loss = f"{found['loss'][0]:.4f} -> {found['loss'][-1]:.4f}"
        memory = f"{found['peak_bytes'] / 2**30:.2f} GiB"
        lines.append(f"| {' | '.join((name, loss, accuracy, margin, kl, time, memory))} |")
    return "\n".join(lines)


def path_of(model: str) -> Path:
    """The kept figures of a model."""
    return KEPT / f"{model}.json"


def read_kept(model: str) -> dict[str, Any]:
    """The kept figures of a model; none where it has none yet."""
    return json.loads(path_of(model).read_text()) if path_of(model).is_file() else {}


def _write(model: str, results: Mapping[str, Any]) -> None:
    """One line a case, so that a difference can be read."""
    KEPT.mkdir(exist_ok=True)
    ordered = [name for name in BY_NAME if name in results]
    lines = [f"  {json.dumps(name)}: {json.dumps(results[name])}" for name in ordered]
    path_of(model).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _run_all(model: str, names: Sequence[str], *, write: bool) -> tuple[dict[str, Any], int]:
    """Run the cases, say of each how it went; the figures, and how much was not as it should be."""
    import tunesmith.pipeline.run  # noqa: F401  before the fork, so that each child has it already

    kept = read_kept(model)
    results, num_faults = dict(kept), 0
    for name in names:
        found = in_own_process(BY_NAME[name], model)
        before = None if write else kept.get(name)
        said = ["it failed"] if found is None else faults(BY_NAME[name], found, before)
        num_faults += len(said)
        print(f"{model}, {name}: {'; '.join(said) or 'as it should be'}", flush=True)
        if found is not None:
            results[name] = found
        if write:
            _write(model, results)
    return results, num_faults


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 where anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--only", nargs="+", choices=BY_NAME, metavar="CASE", default=list(BY_NAME))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(arguments)
    total = 0
    for model in options.model or MODELS:
        kept = (read_kept(model), 0)
        found, num_faults = kept if options.table else _run_all(model, options.only, write=options.write)
        total += num_faults
        print(f"\n{model}\n\n{table(found)}\n")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
