"""The tables in markdown.

In: the content of `latest.json`. Out: text. Must not know: how the figures came about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report import Figure

WORDS = {
    "speed": "times as fast as {side}",
    "memory": "peak RSS, share of {side}'s",
    "gemm": "useful arithmetic, share of the GEMM rate",
    "long": "cost a token of 8,192-token rows against 1,024-token ones, over the ratio of their arithmetic",
    "startup": "seconds to the end of the first step, beyond the imports",
}
UNITS = {"dpo": "pairs/s", "sft": "rows/s"}


def cell(values: Figure, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    """Median in bold, least and most in brackets."""
    low, middle, high = (f"{values[key] * scale:,.{digits}f}" for key in ("min", "median", "max"))
    return f"**{middle}{unit}** ({low}-{high})"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def bars_table(result: Mapping[str, Any]) -> list[str]:
    """Every bar with what was reached."""
    lines = [_row(["case", "what", "wanted", "aim", "reached", ""]), "|---|---|---|---|---|---|"]
    for case in result["cases"].values():
        for bar in case["bars"]:
            scale, unit, digits = (100.0, " %", 0) if bar["what"] == "gemm" else (1.0, "", 2)
            word = "at least" if bar["more_is_better"] else "at most"
            side = "TRL default" if bar["side"] == "trl_default" else "TRL best"
            cells = [
                f"{case['key']}. {case['title']}",
                WORDS[bar["what"]].format(side=side),
                f"{word} {bar['bound'] * scale:g}{unit}",
                f"{bar['aim'] * scale:g}{unit}",
                f"{bar['reached'] * scale:.{digits}f}{unit}",
                "met" if bar["met"] else "NOT met",
            ]
            lines.append(_row(cells))
    return lines


def _side(case: Mapping[str, Any], key: str, row: Mapping[str, Any]) -> str:
    against = case.get("against", {}).get(key)
    ratio = ""
    if against:
        ratio = f"{cell(against['speed'])} times as fast, {against['memory']['median']:.2f} of its memory"
    cells = [
        case["names"][key],
        cell(row["rows_per_second"], 3),
        cell(row["tokens_per_second"], 0),
        cell(row["peak_rss_gib"]),
        f"{row['loaded_rss_gib']['median']:.2f}",
        cell(row["gemm_share"], 0, 100.0, " %"),
        ratio,
    ]
    return _row(cells)


def _sides_table(case: Mapping[str, Any]) -> list[str]:
    unit = UNITS[case["task"]["method"]]
    head = [unit, "useful tokens/s", "peak RSS, GiB", "of it loaded", "share of GEMM rate", "Tunesmith is"]
    return [_row(["", *head]), "|---" * 7 + "|", *(_side(case, key, row) for key, row in case["sides"].items())]


def _equality(case: Mapping[str, Any]) -> str:
    same = case["equality"]
    return (
        f"Equal work: first losses {same['losses']['tunesmith'][0]:.6f} (Tunesmith) and TRL's differ by at most "
        f"{same['first_step_difference']:.1e}, the losses of all steps by {same['largest_difference']:.1e}, the "
        f"gradient's norms ({same['gradient_norms']['tunesmith'][0]:.5f} in the first step) by "
        f"{same['first_norm_difference']:.1e} of themselves, of all steps by {same['largest_norm_difference']:.1e}: "
        f"{'the same' if same['equal'] else 'NOT the same'} work."
    )


def _startup(case: Mapping[str, Any]) -> list[str]:
    figures = case["startup"]
    head = ["seconds to the end of the first step", "to its begin", "the step itself", "the imports, not counted"]
    cells = [cell(figures[key], 1) for key in ("seconds", "seconds_to_step", "step_seconds", "import_seconds")]
    return [_row(head), "|---|---|---|---|", _row(cells)]


def case_lines(case: Mapping[str, Any]) -> list[str]:
    """A case: what it was measured on, its table, whether both sides did the same work, what the search tried."""
    work, gemm = case["workload"], max(case["gemm_gflops"].values(), key=lambda values: values["median"])
    sizes = f" of {work['steps']} step{'s' * (work['steps'] > 1)} x {work['pairs_per_step']} pairs"
    sizes = sizes if "against" in case else ""
    lines = [
        f"**{case['key']}. {case['title']}** ({case['date']}, {work['rounds']} round{'s' * (work['rounds'] > 1)}"
        f"{sizes}, load before a measurement {case['load_before']['min']:.1f} to {case['load_before']['max']:.1f}, "
        f"GEMM rate {cell(gemm, 0)} GFLOP/s)",
        "",
        *(_startup(case) if "startup" in case else _sides_table(case)),
        "",
    ]
    if "equality" in case:
        lines += [_equality(case), ""]
    if "long" in case:
        found = case["long"]
        text = f"A token of a long row takes {cell(found['time'])} times as long, its arithmetic is "
        lines += [f"{text}{found['arithmetic']:.2f} times as much: {cell(found['cost'])}.", ""]
    if case["search"]:
        tried = "; ".join(trial["text"] for trial in case["search"])
        lines += [f"Searched for TRL's best, on 8 pairs: {tried}.", ""]
    return lines


def table(result: Mapping[str, Any]) -> str:
    """The whole page's tables."""
    cases = list(result["cases"].values())
    commands = dict.fromkeys(f"`{case['command']}`" for case in cases)
    machines = dict.fromkeys(
        f"{here['cpu']}, {here['cores']} shared cores, {here['threads']} threads, {here['memory_gib']} GiB, no GPU"
        for here in (case["machine"] for case in cases)
    )
    versions = {name: version for case in cases for name, version in case["versions"].items()}
    lines = [
        f"{', '.join(commands)}: {sum(case['minutes'] for case in cases):.0f} minutes. {'; '.join(machines)}. "
        f"{', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}. float32. "
        "Bold is the median of the rounds, in brackets minimum and maximum.",
        "",
        *bars_table(result),
        "",
    ]
    for case in cases:
        lines += case_lines(case)
    return "\n".join(lines)
