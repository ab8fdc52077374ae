"""A quantized base: trained against its own reference, merged into the weights that it was trained with (TRAPS 56)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import tunesmith
from tests.support.folders import make_run_inputs, tiny_recipe


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_run_on_it_starts_at_ln_2_and_merges_without_loss(tmp_path: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes", reason='needs bitsandbytes: pip install "tunesmith[gpu]"')
    inputs = make_run_inputs(tmp_path)
    model = {"path": str(inputs / "model"), "quantization": quantization}
    run = tunesmith.run(tiny_recipe(inputs, model=model))
    first = json.loads((run / "stages/dpo/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    merged = tunesmith.merge(run)
    assert json.loads((merged / "merge.json").read_text())["mean_kl_nats"] < 1e-6
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
