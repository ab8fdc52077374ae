"""The GPU benchmark at toy size on a CPU: shapes, models, both workers, the driver, the table; no card needed."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import correctness, drive, head, table
from benchmarks.gpu.build import fill_adapter, make_model
from benchmarks.gpu.cases import JOBS, OURS, Case, Side, as_json, from_json
from benchmarks.gpu.meter import WARM_STEPS, Finished, Rounds, Talk
from benchmarks.gpu.old_card import SeenTypes, emulate
from benchmarks.gpu.rows import make_rows
from benchmarks.gpu.shapes import LORA_RANK, SHAPES, ModelShape, useful_flops
from benchmarks.workload import Pair

CPU = torch.device("cpu")
TOY_CASE = Case("toy", "llama-8b", "dpo", "none", "row1024", (OURS,), 1.0, pairs_per_step=2, timed_steps=1, rounds=2)
PORTABLE = replace(OURS, attention="sdpa", kernels="torch", forest_tokens=64)


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("key", "published"),
    [
        ("llama-1b", 1_235_814_400),
        ("phi-2", 2_779_683_840),
        ("llama-8b", 8_030_261_248),
        ("qwen-7b", 7_615_616_512),
        ("qwen-14b", 14_770_033_664),
    ],
)
def test_shapes_have_the_published_parameters(key: str, published: int) -> None:
    assert SHAPES[key].num_parameters == published


@pytest.mark.parametrize("key", ["llama-1b", "phi-2", "qwen-7b"])
def test_the_count_is_that_of_the_real_architecture(key: str) -> None:
    shape = SHAPES[key].toy()
    model = make_model(shape, device=CPU, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    blocks = [module for module in linears if module is not model.get_output_embeddings()]
    assert sum(module.weight.numel() for module in blocks) == shape.linear_weights
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())
    logits = model(input_ids=torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all() and 0.01 < float(logits.std()) < 2


def test_models_of_a_seed_are_equal_and_of_another_are_not() -> None:
    def first(seed: int) -> torch.Tensor:
        model = make_model(SHAPES["llama-1b"].toy(), device=CPU, dtype=torch.float32, seed=seed)
        return model(input_ids=torch.arange(8)[None]).logits

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_nf4_models_are_the_drawn_ones_quantized() -> None:
    pytest.importorskip("bitsandbytes")
    shape = SHAPES["phi-2"].toy()
    exact = make_model(shape, device=CPU, dtype=torch.float32)
    model = make_model(shape, device=CPU, dtype=torch.float32, quantization="nf4")
    assert model.get_submodule("model.layers.0.self_attn.q_proj").weight.dtype == torch.uint8
    ids = torch.arange(8)[None]
    gap = float((model(input_ids=ids).logits - exact(input_ids=ids).logits).std() / exact(input_ids=ids).logits.std())
    assert 0.01 < gap < 0.3  # NF4's own error is some 9 % a matrix


def test_memory_of_weights_by_hand() -> None:
    shape = ModelShape("x", "llama", hidden=4, layers=1, heads=2, kv_heads=1, intermediate=6, vocab=10)
    # q 16, k and v 8, o 16, gate, up, down 24 each: 120. Embeddings and head 40 each, norms 4 * 3.
    assert (shape.linear_weights, shape.num_parameters) == (120, 120 + 80 + 12)
    assert shape.weight_gib("none") * 2**30 == pytest.approx(2 * 212)
    assert shape.weight_gib("nf4") * 2**30 == pytest.approx(2 * 92 + 120 * 4.127 / 8)


def test_flops_of_one_pair_by_hand() -> None:
    shape = ModelShape("x", "llama", hidden=4, layers=1, heads=2, kv_heads=1, intermediate=6, vocab=10)
    adapters = LORA_RANK * (8 + 6 + 6 + 8 + 10 + 10 + 10)
    # Prompt 2, answers 1 and 2: 5 distinct tokens, 3 trained. Keys seen: 1 + 2 | 3 | 3 + 4 = 13.
    pair = Pair([3, 3], [3], [3, 3])
    steps = 5 * (4 * 120 + 6 * adapters) + 3 * 4 * 40 + 13 * 16 * 3
    reference = 5 * 2 * 120 + 3 * 2 * 40 + 13 * 16
    assert useful_flops([pair], "dpo", shape, reference=False) == steps
    assert useful_flops([pair], "dpo", shape, reference=True) == steps + reference


def test_rows_have_the_lengths_that_the_bars_name() -> None:
    rows = make_rows("row1024", 3, seed=0, vocab_size=50)
    assert {(len(pair.prompt) + len(pair.chosen), len(pair.prompt) + len(pair.rejected)) for pair in rows} == {
        (1024, 1024)
    }
    long = make_rows("long", 300, seed=0, vocab_size=50)
    prompts = sorted(len(pair.prompt) for pair in long)
    assert 700 < prompts[150] < 900 and prompts[-1] <= 1200
    assert make_rows("long", 5, seed=0, vocab_size=50) == long[:5]  # more rounds, same first rows
    assert make_rows("mixed", 5, seed=0, vocab_size=50) == make_rows("mixed", 9, seed=0, vocab_size=50)[:5]


def test_adapters_start_equal_whatever_wraps_them() -> None:
    from peft import LoraConfig, get_peft_model

    base = make_model(SHAPES["llama-1b"].toy(), device=CPU, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    count = fill_adapter(adapted, seed=0)
    firsts = [parameter.clone() for name, parameter in adapted.named_parameters() if "lora_A" in name]
    assert fill_adapter(adapted.get_base_model(), seed=0) == count == 2 * 2 * 7
    again = [parameter for name, parameter in adapted.named_parameters() if "lora_A" in name]
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(firsts, again, strict=True))


def test_rounds_leave_the_first_step_out_and_end_by_themselves() -> None:
    talk = Talk()
    rounds = Rounds(talk, CPU, timed_steps=2, num_rounds=2)
    rounds.begin()
    slow = {WARM_STEPS + 1, WARM_STEPS + 4}  # the untimed step of each round
    with pytest.raises(Finished):
        for step in range(1, 100):
            time.sleep(0.2 if step in slow else 0.001)
            rounds.stepped()
    assert rounds.step == rounds.num_steps == WARM_STEPS + 6
    assert [line["event"] for line in talk.said] == ["built", "ready", "round", "round"]
    assert all(line["seconds"] < 0.1 for line in talk.said[2:])


@pytest.mark.parametrize(("method", "first"), [("dpo", math.log(2)), ("sft", math.log(128))])
def test_our_worker_runs_through_the_product(method: Any, first: float) -> None:
    from benchmarks.gpu.worker_tunesmith import measure

    talk = Talk()
    measure(replace(TOY_CASE, method=method), PORTABLE, talk=talk, toy=True)
    events = [line["event"] for line in talk.said]
    assert events == ["built", "reference", "ready", "round", "round", "done"]
    losses = talk.said[4]["losses"]
    assert len(losses) == WARM_STEPS + 4 and len(set(losses)) == len(losses)
    assert losses[0] == pytest.approx(first, abs=1e-5 if method == "dpo" else 0.1)
    assert talk.said[1]["backend"] == "sdpa" and "passed" in talk.said[1]["parity"]
    json.dumps(talk.said)


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed here")
def test_trl_does_the_same_work() -> None:
    from benchmarks.gpu.worker_trl import measure as measure_trl
    from benchmarks.gpu.worker_tunesmith import measure

    case = replace(TOY_CASE, rounds=1)
    ours, theirs = Talk(), Talk()
    measure(case, PORTABLE, talk=ours, toy=True)
    measure_trl(case, Side("trl", "trl", batch=2), talk=theirs, toy=True)
    for a, b in zip(ours.said[-2]["losses"], theirs.said[-2]["losses"], strict=False):
        assert a == pytest.approx(b, abs=1e-5)


def test_a_16_gb_card_runs_the_recipe_to_its_end() -> None:
    case = replace(TOY_CASE, dtype="float16")
    found = emulate(case, replace(PORTABLE, checkpointing="full"), toy=True)
    assert found["met"] and len(found["losses"]) == 3 and found["bfloat16_operations"] == []
    assert found["operations_seen"] > 100


def test_bfloat16_is_seen_forwards_and_backwards() -> None:
    leaf = torch.ones(2, requires_grad=True)
    with SeenTypes() as seen:
        leaf.sum().backward()
        assert not seen.operations
        (leaf.bfloat16() * 1).float().sum().backward()
    assert len(seen.operations) >= 2


def test_jobs_begin_with_the_bars_and_travel_as_json() -> None:
    assert [job.key for job in JOBS[:5]] == [
        "dpo-lora-llama-8b",
        "memory-nf4-qwen-14b",
        "memory-nf4-llama-8b",
        "memory-nf4-phi-2",
        "memory-lora-llama-1b",
    ]
    assert len({job.key for job in JOBS}) == len(JOBS)
    for job in JOBS:
        if job.case is None:
            continue
        assert job.case.model in SHAPES
        for side in job.case.sides:
            assert from_json(json.loads(json.dumps(as_json(job.case, side)))) == (replace(job.case, sides=()), side)


WORKER = """
import json, os, sys, time
out = os.fdopen(int(sys.argv[sys.argv.index("--talk") + 1]), "w")
def say(event, **content):
    print(json.dumps({"event": event, **content}), file=out, flush=True)
what, log = sys.argv[1], sys.argv[2]
say("built", held_gib=1.0, build_peak_gib=1.0)
sys.stdin.readline()
if what == "full":
    raise SystemExit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
say("reference", seconds=3.0, pairs=32)
say("ready", losses=[0.5], peak_gib=1.0, peak_reserved_gib=1.5)
for number in range(3):
    sys.stdin.readline()
    if what == "hang":
        time.sleep(60)
    open(log, "a").write(what)
    say("round", seconds=float(number + 1), steps=2, losses=[0.5] * number, peak_gib=2.0, peak_reserved_gib=2.5)
say("done", versions={"x": "1"})
"""


def _workers(tmp_path: Path, *kinds: str) -> list[drive.Worker]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return [drive.start(kind, [str(script), kind, str(tmp_path / "log")], logs=tmp_path, toy=False) for kind in kinds]


def test_sides_take_turns_and_a_full_card_ends_only_its_own(tmp_path: Path) -> None:
    workers = _workers(tmp_path, "a", "full", "b")
    drive.run_together(workers, num_rounds=3, deadline=time.monotonic() + 20)
    assert (tmp_path / "log").read_text() == "abbaab"  # forwards, backwards, forwards
    first, full, _ = (drive.result_of(worker) for worker in workers)
    assert (first["error"], first["seconds"], first["peak_gib"], first["reference_pairs"]) == ("", [1, 2, 3], 2.0, 32)
    assert full["error"].startswith("out of memory: torch.OutOfMemoryError") and full["seconds"] == []
    assert all(worker.process.poll() is not None for worker in workers)


def test_a_worker_that_hangs_is_ended_and_recorded(tmp_path: Path) -> None:
    (worker,) = _workers(tmp_path, "hang")
    drive.run_together([worker], num_rounds=3, deadline=time.monotonic() + 0.7)
    assert drive.result_of(worker)["error"] == "ran out of time"
    assert worker.process.poll() is not None


def _state(ours: float, default: float, best: float, *, peak: float = 12.0) -> dict[str, Any]:
    def side(name: str, seconds: float, share: float) -> dict[str, Any]:
        fixed = {"name": name, "call": 0, "error": "", "steps": 2, "losses": [0.693147, 0.69], "backend": ""}
        pairs = 100 if share else 0
        memory = {"peak_gib": peak, "peak_reserved_gib": peak + 1}
        return {**fixed, **memory, "seconds": [seconds] * 3, "reference_seconds": 100 * share, "reference_pairs": pairs}

    # A timed round has 32 pairs: a share of 1/32 a pair adds a second to it.
    sides = {"ours": side("ours", ours, 1 / 32), "trl_default": side("default", default, 0.0)}
    sides["trl_batch2_precomputed"] = side("best", best, 1 / 32)
    memory = {"ours_small": side("small", 1.0, 1 / 32)}
    return {
        "calls": [{"tflops": {"a": 700.0}, "toy": False, "date": "2026-11-21", "device": "X", "torch": "2"}],
        "jobs": {
            "dpo-lora-llama-8b": {"sides": sides, "trials": {}},
            "memory-nf4-qwen-14b": {"sides": memory},
        },
    }


def test_bars_are_met_not_met_or_not_measured() -> None:
    bars = "\n".join(table.bars(_state(1.0, 8.0, 4.0)))
    assert "TRL's default: 4.00, wanted at least 2.5: met" in bars  # 8 / (1 + 1)
    assert "TRL's best: 2.50, wanted at least 1.5: met" in bars  # min(5 / 2, 8 / 2, 4 / 1)
    assert "Qwen2.5-14B NF4 DPO, rows of 1,024 tokens, peak memory: 12.00 GiB, wanted at most 13 GiB: met" in bars
    assert "Phi-2 NF4 DPO, rows of 1,024 tokens, peak memory: not measured (wanted at most 5 GiB)" in bars
    slow = "\n".join(table.bars(_state(4.0, 8.0, 4.0, peak=14.0)))
    assert "TRL's default: 1.60, wanted at least 2.5: NOT met" in slow
    assert "TRL's best: 1.00, wanted at least 1.5: NOT met" in slow  # precomputed on both sides: 4 / 4
    assert "14.00 GiB, wanted at most 13 GiB: NOT met" in slow


def test_utilization_counts_the_timed_rows_only() -> None:
    case = next(job.case for job in JOBS if job.key == "dpo-lora-llama-8b")
    assert case is not None
    state = _state(2.0, 8.0, 4.0)
    found = table.all_figures(state, case)["ours"][1]
    assert found is not None
    rows = make_rows("mixed", 200, seed=0, vocab_size=128_256)
    first = rows[3 * 16 : 5 * 16]  # behind two steps of warm-up and the round's untimed one
    assert table.rows_of_round(case, 0, num_rounds=3, toy=False) == first
    need = useful_flops(first, "dpo", SHAPES["llama-8b"], reference=False)
    assert found.mfu == pytest.approx(need / 2.0 / 700e12, rel=0.4)  # the median of three rounds of other rows
    assert found.pairs_per_second == pytest.approx(32 / 3.0)


def test_nothing_measured_says_so_everywhere() -> None:
    text = table.table({"calls": [], "jobs": {}})
    assert text.count("not measured") >= len(JOBS)
    assert "NOT met" not in text and ": met" not in text


def test_toy_figures_meet_no_bar() -> None:
    state = _state(1.0, 8.0, 4.0)
    state["calls"][0]["toy"] = True
    assert all("not measured" in bar for bar in table.bars(state))


def test_where_the_default_does_not_fit_checkpointing_stands_for_it() -> None:
    state = _state(1.0, 8.0, 4.0)
    sides = state["jobs"]["dpo-lora-llama-8b"]["sides"]
    sides["trl_checkpointed"] = {**sides["trl_default"], "seconds": [6.0] * 3}
    sides["trl_default"] |= {"seconds": [], "error": "out of memory"}
    (bar, *_) = table.bars(state)
    assert "TRL's default (with checkpointing: it did not fit without): 3.00" in bar
    assert "out of memory" in table.table(state)


def test_settings_of_a_side_are_in_its_name() -> None:
    names = [side.name for job in JOBS if job.case is not None for side in job.case.sides]
    assert "Tunesmith, attention auto, planned" in names
    assert "TRL, batch 2, checkpointing off, reference precomputed, Liger's layers" in names
    for job in JOBS:
        if job.case is not None:
            assert len({side.name for side in job.case.sides}) == len({side.key for side in job.case.sides})


def test_a_call_goes_on_behind_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def fake(run: Any, case: Case, sides: list[Side], *, num_rounds: int, together: bool) -> dict[str, Any]:
        measured.extend(f"{case.key}/{side.key}" for side in sides)
        result = {"seconds": [1.0], "steps": 1, "reference_pairs": 0, "reference_seconds": 0.0, "error": ""}
        shown = {"name": "", "call": 0, "losses": [], "peak_gib": 1.0, "peak_reserved_gib": 1.0, "backend": ""}
        return {side.key: {**shown, **result} for side in sides}

    card = {"tflops": {"a": 1.0}, "device": "X", "memory_gib": 139.0, "torch": "2"}
    monkeypatch.setattr(driver, "_measure", fake)
    monkeypatch.setattr(driver, "run_alone", lambda *_args, **_options: dict(card))
    words = ["gpu", "--toy", "--only", "memory-nf4-phi-2", "--state", str(tmp_path / "s.json"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    driver.main()
    assert measured[0] == "memory-nf4-phi-2/ours_small"
    count = len(measured)
    driver.main()
    assert len(measured) == count  # nothing was left to do
    state = json.loads((tmp_path / "s.json").read_text())
    assert state["jobs"]["memory-nf4-phi-2"]["finished"] and len(state["calls"]) == 2
    assert (tmp_path / "gpu.json").read_text() == (tmp_path / "s.json").read_text()


def test_the_engines_log_probs_pass_and_a_wrong_gradient_does_not() -> None:
    results = head.measure(minutes=1.0, toy=True)
    assert results and all(result.passes for result in results), results

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logprob_N: torch.Tensor) -> torch.Tensor:
            return logprob_N.clone()

        @staticmethod
        def backward(ctx: Any, grad_N: torch.Tensor) -> torch.Tensor:
            return grad_N * 2

    wrong = head.precision(lambda *inputs: Doubled.apply(head._engine(None)(*inputs)), 32, 200, CPU)
    assert not head.Result("wrong", (1, 1, 1), **wrong).passes


@pytest.mark.skipif(
    find_spec("triton") is None or "TRITON_INTERPRET" not in __import__("os").environ,
    reason="Triton's interpreter is not here; set TRITON_INTERPRET=1 where triton is installed",
)
def test_triton_kernels_equal_float64() -> None:
    for result in head.measure(minutes=1.0, toy=True, interpreted=True):
        assert result.passes, result


def test_only_tests_that_need_a_card_are_kept(tmp_path: Path) -> None:
    text = f"""
import pytest
@pytest.mark.skipif(False, reason="{correctness.REASON}")
def test_card(): pass
def test_other(): raise AssertionError
"""
    path = tmp_path / "test_some.py"
    path.write_text(text)
    (tmp_path / "test_none.py").write_text("raise RuntimeError('not even imported')")
    files = correctness.files_with_cuda_tests(tmp_path)
    assert files == [str(path)]
    only = correctness.OnlyCuda()
    assert pytest.main(["-q", "-p", "no:cacheprovider", "-c", "/dev/null", *files], plugins=[only]) == 0
    assert only.kept == 1
