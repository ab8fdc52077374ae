"""An error says what, where and what to do, and each kind ends the command with its own code."""

from __future__ import annotations

import pytest

from tunesmith import errors
from tunesmith.errors import DataError, RecipeError, StoppedError, TunesmithError


def test_message_with_where_and_remedy() -> None:
    error = DataError("no `chosen`", where="pairs.jsonl:7", remedy="Add it, or drop the row.")
    assert str(error) == "pairs.jsonl:7: no `chosen`\n  Add it, or drop the row."
    assert error.message() == str(error)


def test_message_of_the_bare_fact() -> None:
    assert str(RecipeError("the recipe is empty")) == "the recipe is empty"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("RecipeError", 2),
        ("DataError", 2),
        ("ModelError", 2),
        ("MissingExtraError", 2),
        ("RunFolderError", 2),
        ("ResumeError", 3),
        ("NumericsError", 4),
        ("ResourceError", 5),
        ("LockedError", 6),
    ],
)
def test_exit_codes(name: str, code: int) -> None:
    error = vars(errors)[name]
    assert issubclass(error, TunesmithError)
    assert error.exit_code == code


def test_a_stop_knows_its_signal() -> None:
    assert StoppedError("stopped", signal_number=15).signal_number == 15
