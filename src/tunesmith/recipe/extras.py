"""Optional packages: imported where they are needed, or refused with the command that installs them.

In: a module's name and the extra that brings it. Out: the module.
Must not know: what the module is for.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Literal

from tunesmith.errors import MissingExtraError

Extra = Literal["gpu", "optimizers", "eval", "export", "ui", "dev"]


def need_extra(module: str, extra: Extra) -> ModuleType:
    """Import `module`. Raises MissingExtraError where it is not installed; an error inside it stays its own."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs the package {module}, which is not installed",
            remedy=f'Install it with: pip install "tunesmith[{extra}]"',
        ) from None
