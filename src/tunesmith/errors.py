"""Every error that a person can cause or mend, and the exit code it ends the command with.

In: what happened, where, and what to do about it. Out: one exception type an exit code.
Must not know: torch, files, the command line.

Exit codes: 0 done; 2 bad input, recipe or data; 3 resume refused; 4 numerics; 5 resources
(memory, disk); 6 locked; 130/143 stopped by a signal after a clean save; 1 a bug of ours.
"""

from __future__ import annotations

from typing import ClassVar

from tunesmith.redact import redact


class TunesmithError(Exception):
    """An error with a remedy. The message says what, where and what to do, in that order."""

    exit_code: ClassVar[int] = 2

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(what)

    def __str__(self) -> str:
        return self.message()

    def message(self) -> str:
        """The message as it is printed: `where: what` and, on a line of its own, the remedy; secrets are left out."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        return redact(f"{head}\n  {self.remedy}" if self.remedy else head)


class RecipeError(TunesmithError):
    """The recipe cannot be read, or asks for something that does not exist."""


class DataError(TunesmithError):
    """A data file or row cannot be used."""


class ModelError(TunesmithError):
    """A model, tokenizer, template or adapter cannot be loaded or does not fit the run."""


class MissingExtraError(TunesmithError):
    """An optional package is needed; the remedy names the command that installs it."""


class RunFolderError(TunesmithError):
    """The run folder cannot be read or written."""


class ResumeError(TunesmithError):
    """The run folder holds another run, or a damaged one; nothing was changed."""

    exit_code = 3


class NumericsError(TunesmithError):
    """A loss, gradient or parity check is not finite or not right."""

    exit_code = 4


class ResourceError(TunesmithError):
    """Memory or disk ran out."""

    exit_code = 5


class LockedError(TunesmithError):
    """Another process owns the run folder."""

    exit_code = 6


class StoppedError(TunesmithError):
    """A signal asked the run to stop; the state was saved first."""

    def __init__(self, what: str, *, signal_number: int, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.signal_number = signal_number
