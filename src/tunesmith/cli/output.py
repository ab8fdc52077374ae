"""What the command says when it fails, and what libraries say meanwhile: without secrets.

In: errors, libraries' log records and warnings. Out: lines on standard error. Must not know: commands.
"""

from __future__ import annotations

import logging
import traceback
import warnings

import click

from tunesmith.redact import redact


def say_error(text: str) -> None:
    """One message on standard error."""
    click.echo(redact(text), err=True)


def say_traceback(error: BaseException) -> None:
    """The traceback of an error on standard error."""
    say_error("".join(traceback.format_exception(error)).rstrip("\n"))


def keep_libraries_discreet() -> None:
    """From now on what libraries log or warn about passes through the redactor too."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _warning


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return redact(super().getMessage())


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return redact(f"{filename}:{lineno}: {category.__name__}: {message}\n")
