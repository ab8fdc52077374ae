"""`tunesmith doctor`: what it prints where, and what it ends with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from tunesmith.cli.main import main


class Report:
    """Stands for both reports."""

    def __init__(self, text: str, ok: bool = True) -> None:
        self.text, self.ok = text, ok

    def __str__(self) -> str:
        return self.text

    def as_json(self) -> dict[str, object]:
        return {self.text: self.ok}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str, ok: bool = True) -> tuple[int, str, str]:
        def run_self_test(said: Callable[[str], None]) -> Report:
            said("[1/1] on the way")
            return Report("verdicts", ok)

        module = ModuleType("tunesmith.pipeline.doctor")
        vars(module).update(examine=lambda: Report("facts"), run_self_test=run_self_test)
        monkeypatch.setitem(sys.modules, "tunesmith.pipeline.doctor", module)
        with pytest.raises(SystemExit) as ended:
            main(["doctor", *words])
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return run


def test_facts_alone(call: Callable[..., tuple[int, str, str]]) -> None:
    assert call() == (0, "facts\n", "")


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 4)])
def test_self_test(call: Callable[..., tuple[int, str, str]], ok: bool, code: int) -> None:
    assert call("--self-test", ok=ok) == (code, "facts\n[1/1] on the way\nverdicts\n", "")


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 4)])
def test_json_alone_on_stdout(call: Callable[..., tuple[int, str, str]], ok: bool, code: int) -> None:
    found, out, err = call("--self-test", "--json", ok=ok)
    assert (found, err) == (code, "[1/1] on the way\n")
    assert json.loads(out) == {"facts": True, "self_test": {"verdicts": ok}}
    assert json.loads(call("--json")[1]) == {"facts": True}


def test_help_says_what_it_is_for(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert "--self-test" in out
    assert "4 where a proof of the self-test fails" in out
