"""Patience with a model hub: what may well succeed some seconds later is asked for again.

In: a function that fetches. Out: what it returns, or the last error of the hub's client.
Must not know: models, data sets, what an error means to a person.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Fetched = TypeVar("Fetched")

PAUSES_SECONDS = (1.0, 4.0, 15.0)
"""Before the second and later attempts: a hub that is busy, or a broken line, is often over after some seconds."""
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_BROKEN = ("RemoteProtocolError", "ReadError", "ReadTimeout", "IncompleteRead", "ChunkedEncodingError")
"""Of the transports that the hub's client has had: the line was there and broke. One that was never there is final."""


def fetched(fetch: Callable[[], Fetched], *, pause: Callable[[float], None] = time.sleep) -> Fetched:
    """What `fetch` returns, after four attempts at most; an error that would come again is raised at once."""
    for seconds in PAUSES_SECONDS:
        try:
            return fetch()
        except Exception as problem:  # the hub's client, its transport, its validation: no common ancestor but this
            if not _is_transient(problem):
                raise
        pause(seconds)
    return fetch()


def status_of(problem: BaseException) -> int | None:
    """The HTTP status behind an error of the hub's client; None where there is none."""
    from huggingface_hub.errors import HfHubHTTPError

    seen: BaseException | None = problem
    while seen is not None:
        if isinstance(seen, HfHubHTTPError) and seen.response is not None:
            return int(seen.response.status_code)
        seen = seen.__cause__ or seen.__context__
    return None


def _is_transient(problem: BaseException) -> bool:
    status = status_of(problem)
    if status is not None:
        return status in _TRANSIENT
    seen: BaseException | None = problem
    while seen is not None:
        if type(seen).__name__ in _BROKEN:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
