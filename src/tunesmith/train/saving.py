"""A save that does not lose the training state: tried again where the disk may come back, else kept somewhere else.

In: the stage's folder, its records, and a call that writes the checkpoint into a folder of checkpoints. Out: the
checkpoint; or ResourceError (5) that names where the state was kept instead. Must not know: what is in a checkpoint.

Whatever the disk says at a save, the weights are still in memory: a rescue is a folder with the same layout as the
stage's (`checkpoints/step-N` and the records up to that step) in the system's temporary folder. Copied back over the
stage's folder it is a checkpoint as any other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from tunesmith.errors import ResourceError, RunFolderError
from tunesmith.runs.atomic import remove_folder, write_bytes
from tunesmith.runs.disk import patiently
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Records
from tunesmith.train.checkpoint import list_steps, path_of

RESCUE = "tunesmith-rescue-"
REST = ".rest"
"""Ends the name of records that could not be joined with the file they belong to, because that cannot be read."""


def save_or_rescue(
    folder: StageFolder,
    write: Callable[[Path], Path],
    *,
    records: Records,
    step: int,
    tell: Callable[[str], None],
) -> None:
    """Make the records durable and write the checkpoint of `step`; see the module."""
    try:
        records.flush(folder.metrics_path, folder.eval_path, folder.timings_path)
        patiently(lambda: write(folder.checkpoints), tell=tell)
    except (ResourceError, RunFolderError) as error:
        raise _with_rescue(error, folder, write, records=records, step=step) from error


def finish_rotation(folder: Path, *, newest: int, keep: int, best: int | None) -> None:
    """Remove what a process that was killed between a save and its rotation left, once `newest` was verified.

    Newer ones are damaged and stay until a save takes their place: a person may want to look at them.
    """
    older = [step for step in list_steps(folder) if step <= newest]
    for step in older[:-keep]:
        if step != best:
            remove_folder(path_of(folder, step))


def _with_rescue(
    error: ResourceError | RunFolderError,
    folder: StageFolder,
    write: Callable[[Path], Path],
    *,
    records: Records,
    step: int,
) -> ResourceError:
    """The error of a save that failed: what it was, and where the state is now."""
    try:
        place = _rescue(folder, write, records=records)
    except (ResourceError, RunFolderError, OSError) as problem:
        what = f"{error.what} A copy of the state of step {step} could not be kept elsewhere either: {problem}"
        return ResourceError(what, where=error.where, remedy=error.remedy)
    remedy = (
        f"When there is room and the disk works: `cp -r {place}/. {folder.path}/`, then run the same command again."
    )
    if any(place.glob(f"*{REST}")):
        remedy += f" First append each file *{REST} of it to the file of that name in {folder.path}, and delete it."
    what = f"{error.what} Nothing is lost: the state of step {step} is kept in {place}."
    return ResourceError(what, where=error.where, remedy=remedy)


def _rescue(folder: StageFolder, write: Callable[[Path], Path], *, records: Records) -> Path:
    """A folder of this stage's layout in the temporary folder, mode 0700."""
    place = Path(tempfile.mkdtemp(prefix=RESCUE))
    checkpoints = place / folder.checkpoints.name
    checkpoints.mkdir(mode=0o700)
    write(checkpoints)
    for path in (folder.metrics_path, folder.eval_path, folder.timings_path, folder.warnings_path):
        try:
            content, name = records.content(path), path.name
        except OSError:
            content, name = records.waiting(path), path.name + REST
        if content:
            write_bytes(place / name, content)
    return place
