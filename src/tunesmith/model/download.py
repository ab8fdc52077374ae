"""Fetching a model from the Hugging Face hub: data files only, at one commit, with patience that ends.

In: a model id and revision. Out: its folder in the hub's cache. Must not know: what is in the files.

A download that broke off goes on where it was with the next call; where the cache has it whole, no network is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import ModelError
from tunesmith.model.trust import remote_code_allowed

if TYPE_CHECKING:
    from tunesmith.recipe.models import Model

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")
PAUSES_SECONDS = (1.0, 4.0, 15.0)
"""Before the second and later attempts: 429 and 5xx are often over after some seconds."""
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


def download(model: Model, *, pause: Callable[[float], None] = time.sleep) -> Path:
    """The model's files at its revision. Raises ModelError, which says whether id, rights or network are at fault."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*HUB_FILES, *(["*.py"] if remote_code_allowed() else [])]
    for seconds in (*PAUSES_SECONDS, None):
        try:
            return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as problem:
            if seconds is None or not _is_transient(problem):
                raise _refusal(model, problem) from problem
            pause(seconds)
    raise AssertionError("the last attempt returns or raises")


def _status(problem: BaseException) -> int | None:
    """The HTTP status behind an error of the hub's library."""
    from huggingface_hub.errors import HfHubHTTPError

    seen: BaseException | None = problem
    while seen is not None:
        if isinstance(seen, HfHubHTTPError) and seen.response is not None:
            return int(seen.response.status_code)
        seen = seen.__cause__ or seen.__context__
    return None


def _is_transient(problem: BaseException) -> bool:
    status = _status(problem)
    return status in _TRANSIENT


def _refusal(model: Model, problem: BaseException) -> ModelError:
    status = _status(problem)
    remedy = "Check the id and the network; or give a local folder. What was fetched already is kept."
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        remedy = "The model is private or gated: ask for access on its page, then `hf auth login` (or set HF_TOKEN)."
    elif status == HTTPStatus.NOT_FOUND:
        remedy = "Check the id and model.revision; of a private model the hub says the same without `hf auth login`."
    elif status == HTTPStatus.TOO_MANY_REQUESTS:
        remedy = "Wait some minutes and run the same command; `hf auth login` raises the limit."
    reason = next(iter(str(problem).splitlines()), "") or type(problem).__name__
    return ModelError(f"the model cannot be downloaded: {reason}", where=model.path, remedy=remedy)
