"""From the state of the GPU measurements to figures, bars and a table in markdown.

In: the JSON that the driver wrote. Out: markdown; with `--page`, put between `<!-- gpu:begin -->` and its end.
Must not know: how anything was measured. What was not measured says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu.cases import CHECKPOINTED, JOBS, Case
from benchmarks.gpu.meter import WARM_STEPS
from benchmarks.gpu.rows import make_rows
from benchmarks.gpu.shapes import SHAPES, distinct_tokens, useful_flops
from benchmarks.workload import Pair

HERE = Path(__file__).parent
NOT_MEASURED = "not measured"
LOSS_NOISE = 0.02
"""How far two sides' losses of a step may lie apart in bfloat16, in nats; a wrong batch is tenths away."""
BAR_DEFAULT, BAR_BEST, BAR_MFU = 2.5, 1.5, 0.45


@dataclass(frozen=True)
class Figures:
    """One side's medians over its rounds; with the reference where the method has one in its clock or beside it."""

    pairs_per_second: float
    tokens_per_second: float
    seconds: float  # a round's, with its share of the reference
    cached_seconds: float  # a round's, where the reference costs nothing; the in-loop time where it is in the loop
    peak_gib: float
    reserved_gib: float
    steps_gib: float  # of measured rounds alone: without the parity check, the reference and the first steps
    mfu: float  # of the training steps alone
    mfu_with_reference: float


def rows_of_round(case: Case, number: int, *, num_rounds: int, toy: bool) -> list[Pair]:
    """The pairs that are timed in a round: those of its steps but the first."""
    shape = SHAPES[case.model].toy() if toy else SHAPES[case.model]
    per_round = 1 + case.timed_steps
    num_pairs = (WARM_STEPS + num_rounds * per_round) * case.pairs_per_step
    pairs = make_rows(case.rows, num_pairs, seed=0, vocab_size=shape.vocab, scale=0.03 if toy else 1.0)
    first = (WARM_STEPS + number * per_round + 1) * case.pairs_per_step
    return pairs[first : first + case.timed_steps * case.pairs_per_step]


def figures(case: Case, side: Mapping[str, Any], call: Mapping[str, Any]) -> Figures | None:
    """None where nothing was measured."""
    seconds: Sequence[float] = side["seconds"]
    if not seconds:
        return None
    toy, peak_flops = bool(call["toy"]), 1e12 * max(call["tflops"].values())
    shape = SHAPES[case.model].toy() if toy else SHAPES[case.model]
    # The driver may have asked for other numbers of rounds than the case: rows depend on how many were drawn.
    rounds = [rows_of_round(case, number, num_rounds=len(seconds), toy=toy) for number in range(len(seconds))]
    share = side["reference_seconds"] / side["reference_pairs"] if side["reference_pairs"] else 0.0
    full = [value + share * len(rows) for value, rows in zip(seconds, rounds, strict=True)]

    def mfu(times: Sequence[float], *, reference: bool) -> float:
        flops = [useful_flops(rows, case.method, shape, reference=reference) for rows in rounds]
        return median(need / value / peak_flops for need, value in zip(flops, times, strict=True))

    is_dpo = case.method == "dpo"
    return Figures(
        pairs_per_second=median(len(rows) / value for rows, value in zip(rounds, full, strict=True)),
        tokens_per_second=median(
            distinct_tokens(rows, case.method) / value for rows, value in zip(rounds, full, strict=True)
        ),
        seconds=median(full),
        cached_seconds=median(seconds),
        peak_gib=side["peak_gib"],
        reserved_gib=side["peak_reserved_gib"],
        steps_gib=side.get("steps_peak_gib") or side["peak_gib"],
        mfu=mfu(seconds, reference=is_dpo and not share),  # a reference in the loop is work in the clock
        mfu_with_reference=mfu(full, reference=is_dpo),
    )


def all_figures(
    state: Mapping[str, Any], case: Case, group: str = "sides"
) -> dict[str, tuple[dict[str, Any], Figures | None]]:
    """(what a side said, its figures) by key."""
    job = state["jobs"].get(case.key, {})
    return {key: (side, figures(case, side, state["calls"][side["call"]])) for key, side in job.get(group, {}).items()}


def _bar(text: str, reached: float | None, bound: float, *, at_most: bool = False, unit: str = "") -> str:
    wanted = f"wanted {'at most' if at_most else 'at least'} {bound:g}{unit}"
    if reached is None:
        return f"- {text}: {NOT_MEASURED} ({wanted})"
    met = reached <= bound if at_most else reached >= bound
    return f"- {text}: {reached:.2f}{unit}, {wanted}: {'met' if met else 'NOT met'}"


def bars(state: Mapping[str, Any]) -> list[str]:
    """The issue's bars, each met, NOT met or not measured."""
    if any(call["toy"] for call in state["calls"]):  # figures of no weight meet nothing
        state = {"calls": [], "jobs": {}}
    by_key = {job.key: job for job in JOBS}
    case = by_key["dpo-lora-llama-8b"].case
    assert case is not None
    found = {key: figure for key, (_, figure) in all_figures(state, case).items() if figure is not None}
    ours = found.get("ours", found.get("ours_fixed"))
    default, standin = found.get("trl_default"), ""
    if default is None and CHECKPOINTED.key in found:
        default, standin = found[CHECKPOINTED.key], " (with checkpointing: it did not fit without)"
    rivals = [figure for key, figure in found.items() if key.startswith("trl")]
    against_best = None
    if ours is not None and rivals:
        # Two comparisons, the harder counts: with the reference on both sides, and without it on both.
        against_best = min(rival.seconds / ours.seconds for rival in rivals)
        cached = [
            f
            for key, (side, f) in all_figures(state, case).items()
            if f and key.startswith("trl") and side["reference_pairs"]
        ]
        against_best = min([against_best, *(rival.cached_seconds / ours.cached_seconds for rival in cached)])
    lines = [
        _bar(
            f"Llama-3.1-8B DPO LoRA, times as fast as TRL's default{standin}",
            default.seconds / ours.seconds if ours is not None and default is not None else None,
            BAR_DEFAULT,
        ),
        _bar("Llama-3.1-8B DPO LoRA, times as fast as TRL's best", against_best, BAR_BEST),
        _bar(
            "Llama-3.1-8B DPO LoRA, model FLOPs utilization", None if ours is None else 100 * ours.mfu, 45.0, unit=" %"
        ),
    ]
    for job in JOBS:
        if job.kind == "memory" and job.case is not None and job.case.bar_gib is not None:
            small = all_figures(state, job.case).get("ours_small", (None, None))[1]
            tuning = "NF4" if job.case.quantization == "nf4" else "LoRA bf16"
            name = f"{SHAPES[job.case.model].name} {tuning} DPO, rows of 1,024 tokens, peak memory"
            lines.append(
                _bar(name, None if small is None else small.peak_gib, job.case.bar_gib, at_most=True, unit=" GiB")
            )
    for job in JOBS:
        if job.kind == "emulate":
            assert job.case is not None
            done, name = state["jobs"].get(job.key, {}), SHAPES[job.case.model].name
            said = f"{done.get('summary') or done.get('error')}: {'met' if done.get('met') else 'NOT met'}"
            lines.append(f"- {name} NF4 DPO in 14.7 GiB, float16, sdpa: {said if done else NOT_MEASURED}")
    return lines


def _losses_line(found: Mapping[str, tuple[dict[str, Any], Figures | None]], method: str) -> str:
    """Whether the sides did the same work: the first loss, and all losses that both logged."""
    by_side = {key: side["losses"] for key, (side, figure) in found.items() if figure is not None and side["losses"]}
    theirs = {key: losses for key, losses in by_side.items() if key.startswith("trl")}
    ours = by_side.get("ours", by_side.get("ours_fixed"))
    if not theirs or ours is None:
        return ""
    gaps = [abs(a - b) for losses in theirs.values() for a, b in zip(ours, losses, strict=False)]
    verdict = "the same" if max(gaps) <= LOSS_NOISE else "NOT the same"
    expected = " (ln 2 is 0.693147)" if method == "dpo" else ""
    return f"First loss {ours[0]:.6f}{expected}; losses differ by at most {max(gaps):.1e}: {verdict} work."


def _speed_table(state: Mapping[str, Any], case: Case) -> list[str]:
    unit = "pairs/s" if case.method == "dpo" else "rows/s"
    found = all_figures(state, case)
    trials = {k: v for k, v in all_figures(state, case, "trials").items() if k not in found}
    ours = found.get("ours", (None, None))[1]
    tuning = "NF4" if case.quantization == "nf4" else "LoRA bf16"
    title = f"**{SHAPES[case.model].name}, {case.method.upper()}, {tuning}, {case.rows} rows** (`{case.key}`)"
    if not any(figure for _, figure in (found | trials).values()):
        problems = "; ".join(f"{side['name']}: {side['error']}" for side, _ in (found | trials).values())
        return [f"{title}: {NOT_MEASURED}{f' ({problems})' if problems else ''}", ""]
    lines = [
        title,
        "",
        f"| side | {unit} | distinct tokens/s | MFU of steps | with reference "
        "| GiB: peak / steps / reserved | Tunesmith is |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for key, (side, figure) in (found | trials).items():
        name = side["name"] + (" (one round)" if key in trials else "")
        if figure is None:
            lines.append(f"| {name} | {side['error'].replace('|', '/')} | | | | | |")
            continue
        ratio = "" if key.startswith("ours") or ours is None else f"{figure.seconds / ours.seconds:.2f} times as fast"
        backend = f" [{side['backend']}{side.get('plan', '')}]" if side["backend"] else ""
        lines.append(
            f"| {name}{backend} | {figure.pairs_per_second:.2f} | {figure.tokens_per_second:,.0f} "
            f"| {100 * figure.mfu:.1f} % | {100 * figure.mfu_with_reference:.1f} % "
            f"| {figure.peak_gib:.2f} / {figure.steps_gib:.2f} / {figure.reserved_gib:.2f} | {ratio} |"
        )
    return [*lines, "", _losses_line(found, case.method), ""]


def _head_table(state: Mapping[str, Any]) -> list[str]:
    rows = state["jobs"].get("head", {}).get("rows", [])
    if not rows:
        return [f"**Log-probs, alternatives**: {NOT_MEASURED}", ""]
    lines = ["**Log-probs, forward and backward by hidden states**", ""]
    lines += ["| tokens x hidden x vocabulary | way | ms | peak MiB | float32 error | nats a sequence | passes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        size = " x ".join(map(str, row["size"]))
        if row["problem"]:
            lines.append(f"| {size} | {row['name']} | {row['problem'].replace('|', '/')} | | | | no |")
            continue
        float32 = "" if row["error_float32"] is None else f"{row['error_float32']:.1e}"
        lines.append(
            f"| {size} | {row['name']} | {row['milliseconds']:.2f} | {row['peak_mib']:.0f} | {float32} "
            f"| {row['error_sequence_nats']:.1e} | {'yes' if row['passes'] else 'no'} |"
        )
    return [*lines, ""]


def table(state: Mapping[str, Any]) -> str:
    """The bars, then every case."""
    lines = ["**Bars**", "", *bars(state), ""]
    calls = state["calls"]
    if calls:
        rates = ", ".join(f"{max(call['tflops'].values()):.3g}" for call in calls)
        toys = " TOY SHAPES: figures of no weight." if any(call["toy"] for call in calls) else ""
        lines += [
            f"`python -m benchmarks.gpu`, {calls[-1]['date']}, {calls[-1]['device']}, torch {calls[-1]['torch']}; "
            f"dense bf16 GEMM rate of each call, TFLOP/s: {rates}.{toys}",
            "",
        ]
    for job in JOBS:
        if job.case is not None and job.kind in ("compare", "memory"):
            lines += _speed_table(state, job.case)
    return "\n".join([*lines, *_head_table(state)]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path)
    parser.add_argument("--page", type=Path, help="write the table into this page, and the state into results/gpu.json")
    args = parser.parse_args()
    state = json.loads(args.state.read_text()) if args.state.is_file() else {"calls": [], "jobs": {}}
    text = table(state)
    print(text)
    if args.page is not None:
        from benchmarks.report import put_table

        put_table(args.page, text, mark="gpu")
        if args.state.is_file():
            shutil.copyfile(args.state, HERE.parent / "results" / "gpu.json")


if __name__ == "__main__":
    main()
