"""Fetching a model from the Hugging Face hub: data files only, at one commit, with patience that ends.

In: a model id and revision. Out: its folder in the hub's cache. Must not know: what is in the files.

A download that broke off goes on where it was with the next call; where the cache has it whole, no network is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.hub import fetched, status_of
from tunesmith.errors import ModelError
from tunesmith.model.trust import remote_code_allowed

if TYPE_CHECKING:
    from tunesmith.recipe.models import Model

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")


def download(model: Model, *, pause: Callable[[float], None] = time.sleep) -> Path:
    """The model's files at its revision. Raises ModelError, which says whether id, rights or network are at fault."""
    from huggingface_hub import snapshot_download

    patterns = [*HUB_FILES, *(["*.py"] if remote_code_allowed() else [])]
    try:
        fetch = partial(snapshot_download, model.path, revision=model.revision, allow_patterns=patterns)
        return Path(fetched(fetch, pause=pause))
    except Exception as problem:  # the hub's client, its transport, its validation: no common ancestor but this
        raise _refusal(model, problem) from problem


def _refusal(model: Model, problem: BaseException) -> ModelError:
    status = status_of(problem)
    remedy = "Check the id and the network; or give a local folder. What was fetched already is kept."
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        remedy = "The model is private or gated: ask for access on its page, then `hf auth login` (or set HF_TOKEN)."
    elif status == HTTPStatus.NOT_FOUND:
        remedy = "Check the id and model.revision; of a private model the hub says the same without `hf auth login`."
    elif status == HTTPStatus.TOO_MANY_REQUESTS:
        remedy = "Wait some minutes and run the same command; `hf auth login` raises the limit."
    reason = next(iter(str(problem).splitlines()), "") or type(problem).__name__
    return ModelError(f"the model cannot be downloaded: {reason}", where=model.path, remedy=remedy)
