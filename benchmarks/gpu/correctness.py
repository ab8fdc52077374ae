"""Every test of the suite that needs a CUDA device, and the product's own self-test, on this machine.

In: nothing. Out: their output, and a code that is 0 where all passed. Must not know: what they prove.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.drive import ROOT, environment

REASON = "needs a CUDA device"
"""The words by which a test says so, in its `skipif`."""


class OnlyCuda:
    """A pytest plugin that keeps the tests which are skipped without a card."""

    def __init__(self) -> None:
        self.kept = 0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [
            item
            for item in items
            if any(REASON in str(mark.kwargs.get("reason", "")) for mark in item.iter_markers("skipif"))
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
        self.kept = len(kept)


def files_with_cuda_tests(folder: Path) -> list[str]:
    """Test files that hold the words; the others are not even imported."""
    return sorted(
        str(path)
        for path in folder.rglob("test_*.py")
        if REASON in path.read_text() and path.stem != "test_benchmarks_gpu"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=Path, default=ROOT / "tests")
    parser.add_argument("--no-self-test", action="store_true")
    parser.add_argument("--seconds", type=float, default=150.0, help="for the self-test")
    args = parser.parse_args()
    only, files = OnlyCuda(), files_with_cuda_tests(args.tests)
    code = 0
    if files:
        code = int(pytest.main(["-q", "-p", "no:cacheprovider", "--durations=5", *files], plugins=[only]))
    print(f"CUDA tests: {only.kept} in {len(files)} files, exit code {code}", flush=True)
    if not args.no_self_test:
        words = "from tunesmith.cli.main import main; main()"
        command = [sys.executable, "-c", words, "doctor", "--self-test"]
        try:
            self_test = subprocess.run(command, cwd=ROOT, env=environment(toy=False), timeout=args.seconds).returncode
        except subprocess.TimeoutExpired:
            self_test = 124
        print(f"doctor --self-test: exit code {self_test}", flush=True)
        code = code or self_test
    raise SystemExit(code if code != 5 else 0)  # 5: no test was collected


if __name__ == "__main__":
    main()
