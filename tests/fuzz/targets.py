"""Every target of the fuzz, with its part of the cases.

In: a folder for what the cases share. Out: the targets. Must not know: how cases are run.
"""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.run import Target
from tests.fuzz.targets_data import data_targets
from tests.fuzz.targets_runs import run_targets


def make_targets(folder: Path, only: str | None = None) -> list[Target]:
    """All of them, or one; a finished run is made only where it is needed."""
    targets = data_targets(folder)
    if only not in {target.name for target in targets}:
        targets += run_targets(folder)
    return [target for target in targets if only in (None, target.name)]
