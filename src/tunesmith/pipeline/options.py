"""What a person allows a run on the command line, beyond its recipe.

In: nothing. Out: one record. Must not know: what it is used for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunOptions:
    """strict: a damaged checkpoint or result ends the run (exit 3) instead of walking back to the newest whole one.
    accept_data_change: rows that changed since the run began are taken; what was trained on the old ones is kept, and
    the manifest says so. reuse: stages that another run in the folder has finished with equal inputs are copied.
    owns_process: the process is the command's own. Its time limit counts from its start, and it may be ended where it
    does not come to a stop in time; a notebook or a script of somebody else never is."""

    strict: bool = False
    accept_data_change: bool = False
    reuse: bool = True
    owns_process: bool = False
