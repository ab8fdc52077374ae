"""The benchmark's own parts at toy size: rows, the count of arithmetic, cases, our worker, the report; no TRL."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, search, table
from benchmarks.cases import CASES, Setting, candidates, sides
from benchmarks.prepare import prepare
from benchmarks.workload import (
    EOS_ID,
    Pair,
    Shape,
    Task,
    Workload,
    load_workload,
    make_pairs,
    make_rows,
    padded_tokens,
    useful_flops,
    useful_tokens,
)

TOY = Shape(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=24, vocab_size=50, lora_rank=2)


def test_pairs_are_the_same_for_a_seed_and_others_for_another() -> None:
    assert make_pairs(3, seed=0, vocab_size=50) == make_pairs(3, seed=0, vocab_size=50)
    assert make_pairs(3, seed=0, vocab_size=50) != make_pairs(3, seed=1, vocab_size=50)


def test_pairs_have_the_stated_lengths_and_end_once() -> None:
    pairs = make_pairs(400, seed=0, vocab_size=50)
    for rows, median in (
        ([pair.prompt for pair in pairs], 200),
        ([pair.chosen for pair in pairs], 180),
        ([pair.rejected for pair in pairs], 160),
    ):
        lengths = sorted(map(len, rows))
        assert lengths[-1] <= 900
        assert median / 1.15 < lengths[len(lengths) // 2] < median * 1.15
    assert all(answer[-1] == EOS_ID for pair in pairs for answer in (pair.chosen, pair.rejected))
    assert not any(EOS_ID in ids for pair in pairs for ids in (pair.prompt, pair.chosen[:-1], pair.rejected[:-1]))


def test_padding_counts_every_row_of_a_batch_at_its_longest() -> None:
    pairs = [Pair([3] * 4, [3] * 2, [3] * 3), Pair([3] * 5, [3] * 5, [3] * 1)]
    assert useful_tokens(pairs, "dpo") == 4 + 2 + 3 + 5 + 5 + 1
    assert padded_tokens(pairs, "dpo", 2) == 4 * 10
    assert padded_tokens(pairs, "dpo", 1) == 2 * 7 + 2 * 10
    assert padded_tokens(pairs, "sft", 1) == useful_tokens(pairs, "sft") == 6 + 10


def test_flops_of_one_pair_by_hand() -> None:
    shape = Shape(
        hidden_size=4, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=6, vocab_size=10, lora_rank=1
    )
    # Linear layers: q 4x4, k and v 4x2, o 4x4, gate and up 4x6, down 6x4: 16 + 8 + 8 + 16 + 24 + 24 + 24 = 120.
    # Adapters of rank 1: 8 + 6 + 6 + 8 + 10 + 10 + 10 = 58. LM head: 40.
    # Prompt 2, answers 1 and 2: 5 distinct tokens. Keys seen: 1 + 2 | 3 | 3 + 4 = 13.
    # SFT of the chosen answer: 3 tokens, keys seen 1 + 2 + 3 = 6.
    pair = Pair([3, 3], [3], [3, 3])
    dpo = 5 * (6 * 120 + 6 * 58) + 3 * 6 * 40 + 13 * 16 * 4
    sft = 3 * (4 * 120 + 6 * 58) + 1 * 4 * 40 + 6 * 16 * 3
    assert useful_flops([pair], Task("dpo", "lora", "loop"), shape) == dpo
    assert useful_flops([pair], Task("sft"), shape) == sft
    # A cached reference costs no forward pass: 2 a weight and a quarter of the attention less.
    cached = 5 * (4 * 120 + 6 * 58) + 3 * 4 * 40 + 13 * 16 * 3
    assert useful_flops([pair], Task("dpo", "lora", "cached"), shape) == cached
    # In full: 6 a weight of the blocks and of the head, 2 more for the reference's forward, no adapter.
    full = 5 * 8 * 120 + 3 * 8 * 40 + 13 * 16 * 4
    assert useful_flops([pair], Task("dpo", "full", "loop"), shape) == full


def test_rows_of_one_length_have_it_and_end_once() -> None:
    rows = make_rows(3, 21, seed=0, vocab_size=50)
    assert [len(row.prompt) + len(row.chosen) for row in rows] == [21, 21, 21]
    assert all(row.chosen[-1] == EOS_ID and EOS_ID not in row.prompt + row.chosen[:-1] for row in rows)


def test_a_setting_is_read_as_it_is_written_and_names_all_that_it_sets() -> None:
    for setting in (
        Setting(4),
        Setting(1, checkpointing=True),
        Setting(2, flat="padding_free"),
        Setting(1, flat="bfd"),
    ):
        assert Setting.parse(setting.text()) == setting
    assert Setting.parse("batch=1,checkpointing=off") == Setting(1)
    assert Setting(4, checkpointing=True).name(16) == "batch 4 x 4, checkpointing on"
    for wrong in ("batch=0", "batch=1,flat=wrapped", "batch=1,liger=on", "checkpointing=on"):
        with pytest.raises((ValueError, KeyError)):
            Setting.parse(wrong)


def test_the_search_covers_batches_with_and_without_checkpointing_and_packing_only_where_it_is_the_same_work() -> None:
    dpo = candidates(CASES["a"].task, rows_per_step=8, one_step=True)
    assert dpo == [Setting(batch, on) for on in (False, True) for batch in (1, 2, 4, 8)]
    assert Setting(1, flat="bfd") in candidates(CASES["c"].task, rows_per_step=8, one_step=True)
    assert Setting(1, flat="bfd") not in candidates(CASES["c"].task, rows_per_step=8, one_step=False)
    assert [setting.batch for setting in candidates(CASES["a"].task, rows_per_step=4, one_step=True)] == [1, 2, 4] * 2


def test_the_search_takes_the_fastest_that_does_the_same_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seconds = {1: 5.0, 2: 4.0, 4: 3.0, 8: 9.0}

    def measure(side: Any, task: Task, **kwargs: object) -> dict[str, Any]:
        assert side.setting is not None
        if side.setting.checkpointing:
            raise search.Failed("Traceback\nRuntimeError: no")
        norm = 2.0 if side.setting.batch == 4 else 1.0  # the fastest, but other gradients: other work
        taken = seconds[side.setting.batch]
        return {"seconds": taken, "peak_rss_gib": 1.0, "losses": [0.7], "gradient_norms": [norm]}

    monkeypatch.setattr(search, "measure", measure)
    best, trials = search.find_best(
        CASES["a"], folder=tmp_path, threads=1, peer_python="python", num_rows=8, one_step=True
    )
    assert best == Setting(2)
    assert "other work" in trials[2].problem and trials[-1].problem == "RuntimeError: no"


def test_sides_of_each_case() -> None:
    named = {key: [side.key for side in sides(case, rows_per_step=16, best=Setting(1))] for key, case in CASES.items()}
    both, best = ["tunesmith", "trl_default", "trl_best"], ["tunesmith", "trl_best"]
    assert named == {"a": both, "b": best, "c": both, "d": best, "e": ["rows_1024", "rows_8192"], "f": ["startup"]}
    usual = sides(CASES["a"], rows_per_step=16, best=Setting(1))[1]
    assert usual.setting == Setting(4) and "batch 4 x 4, checkpointing off" in usual.name


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    pairs = make_pairs(4, seed=0, vocab_size=TOY.vocab_size, scale=0.05)
    workload = Workload(pairs=pairs, pairs_per_step=2, num_threads=1, learning_rate=1e-2, shape=TOY)
    workload.save(folder / "workload.json")
    assert load_workload(folder / "workload.json") == workload
    prepare(workload, folder)
    return folder


TASKS = [CASES[key].task for key in "abcd"]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.method}-{task.tuning}-{task.reference}")
def test_our_worker_runs_and_its_first_loss_is_known(work_folder: Path, task: Task) -> None:
    from benchmarks.worker_tunesmith import measure

    threads = torch.get_num_threads()
    try:
        result: dict[str, Any] = measure(work_folder, task)
    finally:
        torch.set_num_threads(threads)
    first, second = result["losses"]
    # Reference and policy agree at the start; random weights guess one of 50 tokens.
    expected, tolerance = (math.log(2), 1e-5) if task.method == "dpo" else (math.log(50), 0.1)
    assert first == pytest.approx(expected, abs=tolerance)
    assert second != first
    assert len(result["gradient_norms"]) == 2 and min(result["gradient_norms"]) > 0
    assert 0 < result["loaded_rss_gib"] <= result["peak_rss_gib"]
    assert result["seconds"] > 0
    json.dumps(result)


def _row(side: str, number: int, seconds: float, peak: float, **more: Any) -> dict[str, Any]:
    versions = {"tunesmith": "0", "trl": "1", "torch": "2", "transformers": "5"}
    fixed = {"load_before": 0.1, "cpu_seconds": 1.0, "loaded_rss_gib": 0.5, "versions": versions}
    same = {"losses": [0.7], "gradient_norms": [2.0]}
    return fixed | same | {"side": side, "round": number, "seconds": seconds, "peak_rss_gib": peak} | more


def _done(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = {row["side"]: row["side"] for row in rows}
    return {"names": names, "search": [], "measurements": rows, "gemm": [{"x": 50.0, "y": 100.0}] * 3}


def _against_trl(**trl: Any) -> list[dict[str, Any]]:
    sides = (("tunesmith", 2.0, 1.0, {}), ("trl_default", 12.0, 4.0, trl), ("trl_best", 5.0, 2.0, trl))
    return [_row(side, n, time * (n + 1), peak, **more) for n in range(3) for side, time, peak, more in sides]


def _summary(key: str, rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    workload = Workload(pairs=[Pair([3] * 4, [3] * 2, [3] * 3)], pairs_per_step=1, shape=TOY)
    return report.summarize(CASES[key], _done(rows), folder=folder, workload=workload, minutes=1.0)


def test_ratios_are_taken_within_a_round_and_judged_by_the_bars(tmp_path: Path) -> None:
    found = _summary("a", _against_trl(), tmp_path)
    speed = found["against"]["trl_default"]["speed"]
    assert speed == {"min": 6.0, "median": 6.0, "max": 6.0}  # though times differ threefold
    assert found["against"]["trl_default"]["memory"]["median"] == 0.25
    verdicts = [(bar["what"], bar["bound"], bar["met"]) for bar in found["bars"]]
    # 6 >= 5, 2.5 < 3, 0.25 <= 0.4, and next to no arithmetic
    assert verdicts == [("speed", 5.0, True), ("speed", 3.0, False), ("memory", 0.4, True), ("gemm", 0.5, False)]
    text = table.table({"cases": {"a": found}})
    assert text.count("NOT met") == 2 and "the same work" in text


def test_other_losses_or_other_gradients_mean_other_work(tmp_path: Path) -> None:
    assert _summary("a", _against_trl(), tmp_path)["equality"]["equal"]
    assert not _summary("a", _against_trl(losses=[0.7002]), tmp_path)["equality"]["equal"]
    assert not _summary("a", _against_trl(gradient_norms=[2.01]), tmp_path)["equality"]["equal"]


def test_long_rows_are_judged_by_what_their_arithmetic_says(tmp_path: Path) -> None:
    for length in (1024, 8192):
        rows = make_rows(8192 // length, length, seed=0, vocab_size=TOY.vocab_size)
        Workload(pairs=rows, pairs_per_step=len(rows), shape=TOY).save(tmp_path / f"rows_{length}.json")
    rows = [_row(f"rows_{length}", n, time, 1.0) for n in range(3) for length, time in ((1024, 2.0), (8192, 20.0))]
    found = _summary("e", rows, tmp_path)["long"]
    # TOY: 2 layers of 4 linears 16x16, 2 of 16x8 and 3 of 16x24; per token 4N + 6 adapters + head / 2 * 4, and
    # attention over half of the length: 12 * 16 * 2 * (length + 1) / 2 operations.
    linear = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
    adapters = 2 * 2 * (2 * 32 + 2 * 24 + 3 * 40)
    fixed = 4 * linear + 6 * adapters + 50 * 16 * 2
    arithmetic = (fixed + 192 * 8193) / (fixed + 192 * 1025)
    assert found["arithmetic"] == pytest.approx(arithmetic)
    assert found["time"]["median"] == pytest.approx(10.0)  # the same tokens in ten times the time
    assert found["cost"]["median"] == pytest.approx(10.0 / arithmetic)


def test_the_start_is_judged_by_its_seconds(tmp_path: Path) -> None:
    more = {"seconds_to_step": 8.0, "step_seconds": 3.0, "import_seconds": 5.0}
    found = _summary("f", [_row("startup", n, 11.0, 1.0, **more) for n in range(3)], tmp_path)
    assert [(bar["reached"], bar["met"]) for bar in found["bars"]] == [(11.0, False)]
    assert "**8.0** (8.0-8.0)" in table.table({"cases": {"f": found}})


def test_a_case_measured_again_replaces_its_own_figures_only(tmp_path: Path) -> None:
    from benchmarks.compare_trl import merge

    path = tmp_path / "latest.json"
    path.write_text(json.dumps({"schema": 1, "methods": {}}))  # of an older form: not read
    merge(path, {"key": "c", "figure": 1})
    merge(path, {"key": "a", "figure": 2})
    assert merge(path, {"key": "c", "figure": 3})["cases"] == {
        "a": {"key": "a", "figure": 2},
        "c": {"key": "c", "figure": 3},
    }


def test_the_table_replaces_what_stands_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nbelow\n")
    report.put_table(page, "new\n")
    assert page.read_text() == "above\n<!-- bench:begin -->\nnew\n<!-- bench:end -->\nbelow\n"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="no <!-- bench:begin -->"):
        report.put_table(page, "new\n")
