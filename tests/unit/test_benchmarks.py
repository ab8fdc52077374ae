"""The benchmark's own parts at toy size: rows, the count of arithmetic, our side's worker, the report; no TRL."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.prepare import prepare
from benchmarks.workload import (
    EOS_ID,
    Pair,
    Shape,
    Workload,
    load_workload,
    make_pairs,
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
    assert useful_flops([pair], "dpo", shape) == dpo
    assert useful_flops([pair], "sft", shape) == sft


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    pairs = make_pairs(4, seed=0, vocab_size=TOY.vocab_size, scale=0.05)
    workload = Workload(pairs=pairs, pairs_per_step=2, num_threads=1, learning_rate=1e-2, shape=TOY)
    workload.save(folder / "workload.json")
    assert load_workload(folder / "workload.json") == workload
    prepare(workload, folder)
    return folder


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_our_worker_runs_and_its_first_loss_is_known(work_folder: Path, method: str) -> None:
    from benchmarks.worker_tunesmith import measure

    threads = torch.get_num_threads()
    try:
        result: dict[str, Any] = measure(work_folder, method)
    finally:
        torch.set_num_threads(threads)
    first, second = result["losses"]
    # Reference and policy agree at the start; random weights guess one of 50 tokens.
    assert first == pytest.approx(
        math.log(2) if method == "dpo" else math.log(50), abs=1e-5 if method == "dpo" else 0.1
    )
    assert second != first
    assert 0 < result["loaded_rss_gib"] <= result["peak_rss_gib"]
    assert result["seconds"] > 0
    json.dumps(result)


def _done(*, trl_loss: float = 0.7) -> dict[str, Any]:
    def row(side: str, number: int, seconds: float, peak: float, loss: float) -> dict[str, Any]:
        versions = {"tunesmith": "0", "trl": "1", "torch": "2", "transformers": "5"}
        fixed = {"method": "dpo", "load_before": 0.1, "cpu_seconds": 1.0, "loaded_rss_gib": 0.5, "versions": versions}
        return fixed | {"side": side, "round": number, "seconds": seconds, "peak_rss_gib": peak, "losses": [loss]}

    measurements = [
        row(side, number, seconds * (number + 1), peak, loss)
        for number in range(3)
        for side, seconds, peak, loss in (
            ("tunesmith", 2.0, 1.0, 0.7),
            ("trl_default", 12.0, 4.0, trl_loss),
            ("trl_batch1", 5.0, 2.0, trl_loss),
        )
    ]
    return {"measurements": measurements, "gemm": [{"a": 50.0, "b": 100.0}] * 3}


def _summary(done: dict[str, Any]) -> dict[str, Any]:
    workload = Workload(pairs=[Pair([3] * 4, [3] * 2, [3] * 3)], pairs_per_step=1, shape=TOY)
    names = {"tunesmith": "Tunesmith", "trl_default": "TRL, batch 4 x 4", "trl_batch1": "TRL, batch 1 x 16"}
    return report.summarize(done, workload, names=names, minutes=1.0)


def test_ratios_are_taken_within_a_round_and_judged_by_the_floors() -> None:
    result = _summary(_done())
    against = result["methods"]["dpo"]["against"]
    assert against["trl_default"]["speed"] == {"min": 6.0, "median": 6.0, "max": 6.0}  # though times differ threefold
    assert against["trl_default"]["memory"]["median"] == 0.25
    assert [floor["met"] for floor in result["floors"]] == [True, False, True]  # 6 >= 5, 2.5 < 3, 0.25 <= 0.4
    assert "NOT met" in report.table(result)


def test_other_losses_mean_other_work() -> None:
    assert _summary(_done())["methods"]["dpo"]["equality"]["equal"]
    assert not _summary(_done(trl_loss=0.7002))["methods"]["dpo"]["equality"]["equal"]


def test_the_table_replaces_what_stands_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nbelow\n")
    report.put_table(page, "new\n")
    assert page.read_text() == "above\n<!-- bench:begin -->\nnew\n<!-- bench:end -->\nbelow\n"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="no <!-- bench:begin -->"):
        report.put_table(page, "new\n")
