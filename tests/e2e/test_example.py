"""The teaching twin runs, stays short, and learns."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest


def test_minimal_dpo(project: Path) -> None:
    path = project / "examples/minimal_dpo.py"
    assert len(path.read_text().splitlines()) <= 110
    spec = importlib.util.spec_from_file_location("minimal_dpo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sft, dpo = module.main(8, 3)
    assert sft[-1] < sft[0]
    assert dpo[0] == pytest.approx(math.log(2), abs=1e-5)
    assert dpo[-1] < dpo[0]
