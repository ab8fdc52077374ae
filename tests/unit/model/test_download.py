"""F40: a hub that is busy, down, private or unknown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from tunesmith.data.hub import PAUSES_SECONDS
from tunesmith.errors import ModelError
from tunesmith.model.download import HUB_FILES, download
from tunesmith.model.trust import remote_code
from tunesmith.recipe.models import Model

MODEL = Model(path="org/own", revision="main")


def response(status: int) -> Any:
    """What the hub's errors read of an answer, whichever HTTP library it comes from."""
    request = SimpleNamespace(method="GET", url="https://hub/api/models/org/own")
    return SimpleNamespace(status_code=status, headers={}, request=request)


def failing(error: Callable[[], Exception], asked: list[dict[str, object]], *, times: int = 99) -> Callable[..., str]:
    def snapshot_download(path: str, **settings: object) -> str:
        asked.append({"path": path, **settings})
        if len(asked) <= times:
            raise error()
        return "/cache/org/own"

    return snapshot_download


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_waited_for(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    busy = failing(lambda: HfHubHTTPError("busy", response=response(status)), asked, times=2)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", busy)
    pauses: list[float] = []
    assert download(MODEL, pause=pauses.append) == Path("/cache/org/own")
    assert pauses == list(PAUSES_SECONDS[:2])


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        failing(lambda: HfHubHTTPError("429 Client Error", response=response(429)), asked),
    )
    with pytest.raises(ModelError, match=r"(?s)429 Client Error.*Wait some minutes"):
        download(MODEL, pause=lambda seconds: None)
    assert len(asked) == len(PAUSES_SECONDS) + 1


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (lambda: GatedRepoError("gated", response=response(403)), "hf auth login"),
        (lambda: HfHubHTTPError("401", response=response(401)), "hf auth login"),
        (lambda: RepositoryNotFoundError("none", response=response(404)), "Check the id and model.revision"),
        (lambda: LocalEntryNotFoundError("no network"), "What was fetched already is kept"),
        (lambda: OSError(""), "OSError"),
    ],
)
def test_what_does_not_pass_is_said_at_once(
    error: Callable[[], Exception], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error, asked))

    def no_pause(seconds: float) -> NoReturn:
        raise AssertionError("it waited")

    with pytest.raises(ModelError) as caught:
        download(MODEL, pause=no_pause)
    assert remedy in str(caught.value) and "org/own" in str(caught.value)


def test_only_data_files_are_fetched_and_code_only_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(OSError, asked, times=0))
    download(MODEL)
    with remote_code():
        download(MODEL)
    assert [each["allow_patterns"] for each in asked] == [[*HUB_FILES], [*HUB_FILES, "*.py"]]
    assert not [name for name in HUB_FILES if name.endswith((".py", ".bin", ".pt", "*"))]
