"""`tunesmith --help` answers at once, and what needs no model imports none."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

HELP_SECONDS = 0.3
HEAVY = ("torch", "transformers", "datasets", "peft", "pyarrow", "accelerate", "numpy", "pydantic", "rich")
TORCH = ("torch", "transformers", "datasets", "peft", "pyarrow")


def cpu_seconds_of(*words: str) -> float:
    """User and system time of one `python -m tunesmith`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "tunesmith", *words], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def modules_after(*words: str) -> list[str]:
    """The heavy modules that the command has imported when it ends."""
    code = (
        "import sys\nfrom tunesmith.cli.main import main\n"
        f"try:\n    main({list(words)!r})\nexcept SystemExit as ended:\n    assert not ended.code, ended.code\n"
        f"print('heavy:', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("--version",)])
def test_help_takes_less_than_its_budget(words: tuple[str, ...]) -> None:
    # The least of five: another process on the same core can only add.
    assert min(cpu_seconds_of(*words) for _ in range(5)) < HELP_SECONDS


@pytest.mark.parametrize("words", [("--help",), ("recipe", "--help"), ("doctor", "--help"), ("--version",)])
def test_help_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    assert modules_after(*words) == []


@pytest.mark.parametrize("words", [("recipe", "list"), ("recipe", "schema"), ("recipe", "explain", "dpo-mix-7k")])
def test_recipes_need_no_torch(words: tuple[str, ...]) -> None:
    assert not set(modules_after(*words)) & set(TORCH)


def test_importing_the_package_costs_nothing() -> None:
    code = f"import sys, tunesmith\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
