"""Hugging Face data sets: an id to a commit, and the data files of that commit.

In: a source whose path is an id. Out: the commit, and a local folder with its data files; or one DataError.
Only data files are downloaded, so a repository's scripts cannot run: they are not even here. A commit that lies in the
hub's cache needs no network; of one that was fetched in part, the files that are whole are not fetched again.
Must not know: splits, rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tunesmith.data.hub import fetched
from tunesmith.data.sources.paths import ARCHIVES, SUFFIXES
from tunesmith.errors import DataError
from tunesmith.recipe.models import Source

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CARD = ["README.md", ".huggingface.yaml"]
_DATA_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv", ".txt")
_DATA_FILES = tuple(f"*{suffix}{packed}" for suffix in _DATA_SUFFIXES for packed in ("", ".gz", ".zst"))
_downloaded: dict[tuple[str, str], Path] = {}


def is_hub_id(path: str) -> bool:
    """Whether a path where nothing lies can be a data set's id: `org/name`, and no slip in a local path."""
    if not _ID.fullmatch(path) or path.lower().endswith((*SUFFIXES, *ARCHIVES, ".gz", ".zst", ".arrow", ".py")):
        return False
    return not Path(path).parent.exists()


def hint(path: str) -> str:
    """What to add to `no such file` for a path that may have been meant as a data set's id."""
    return "" if "/" in path or "." in path else " A Hugging Face data set is named `org/name`."


def resolve_commit(source: Source) -> str:
    """The 40-hex commit that the source's revision (the newest, where it names none) stands for."""
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return source.revision
    return _snapshot(source, source.revision, _CARD).name


def download(source: Source, commit: str) -> Path:
    """The folder with the data files of a commit, downloaded where the hub's cache does not hold them."""
    card = _snapshot(source, commit, _CARD) / "README.md"
    folder = _snapshot(source, commit, [*_CARD, *_patterns(card, source)])
    _downloaded[source.path, commit] = folder
    return folder


def num_bytes(source: Source, commit: str) -> int:
    """Size of the data files, once this process has them; 0 before."""
    folder = _downloaded.get((source.path, commit))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else 0


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the progress bars of the hub's client, one a file."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            enable_progress_bars()


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the progress bars of `datasets`: rows are counted and said by us."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            enable_progress_bar()


def _patterns(card: Path, source: Source) -> list[str]:
    """The data files to download: those of the configuration, where the card names them, else all.

    Raises DataError where the card has several configurations and the recipe names none of them.
    """
    configs = _configs(card, source)
    if not configs:
        return list(_DATA_FILES)
    names = [str(config.get("config_name", "default")) for config in configs]
    defaults = [name for name, config in zip(names, configs, strict=True) if config.get("default") or name == "default"]
    wanted = source.config or (names[0] if len(names) == 1 else next(iter(defaults), None))
    if wanted not in names:
        what = f"there is no configuration `{wanted}`" if wanted else "the data set has several configurations"
        raise DataError(what, where=source.path, remedy=f"Set `config` to one of: {', '.join(names)}.")
    config = configs[names.index(wanted)]
    folder = f"{str(config['data_dir']).strip('/')}/" if config.get("data_dir") else ""
    paths = [folder + path for path in _paths(config.get("data_files"))] or [f"{folder}*"]
    return [pattern for path in paths for pattern in _data_only(path)]


def _configs(card: Path, source: Source) -> list[dict[str, object]]:
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError  # type: ignore[import-untyped]

    if not card.is_file():
        return []
    try:
        configs = (metadata_load(card) or {}).get("configs") or []
    except (YAMLError, ValueError, OSError) as error:
        raise DataError("the data set's card, README.md, cannot be read", where=source.path) from error
    return [config for config in configs if isinstance(config, dict)]


def _paths(data_files: object) -> list[str]:
    """The card's `data_files`: a path, a list of paths, or a list of splits with a path or paths each."""
    if isinstance(data_files, str):
        return [data_files]
    if isinstance(data_files, list):
        return [path for item in data_files for path in _paths(item)]
    return _paths(data_files.get("path")) if isinstance(data_files, dict) else []


def _data_only(path: str) -> list[str]:
    """The patterns for the data files among what a path of a card matches: never a script."""
    if path.lower().endswith(tuple(pattern[1:] for pattern in _DATA_FILES)):
        return [path]
    return [path.removesuffix("*") + pattern for pattern in _DATA_FILES]


def _snapshot(source: Source, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return _fetched(source, revision, patterns)
    except GatedRepoError as error:
        raise _refusal(
            source, "the data set is gated", "Ask for access on its page, then `hf auth login`.", error
        ) from error
    except RevisionNotFoundError as error:
        raise _refusal(source, f"there is no revision {revision!r}", "Check `revision`.", error) from error
    except RepositoryNotFoundError as error:
        remedy = "Check the id and the working directory; for a private one, `hf auth login`."
        raise _refusal(source, "no such local path, and no such data set on the hub", remedy, error) from error
    except Exception as error:  # the hub's client, its transport, its validation: no common ancestor but this
        remedy = "Check the network (HF_HUB_OFFLINE, HF_ENDPOINT), or download the files and name them."
        raise _refusal(
            source, "no such local path, and the hub cannot be reached for a data set of this name", remedy, error
        ) from error


def _fetched(source: Source, revision: str | None, patterns: list[str]) -> Path:
    """The files; the last error of the hub's client where patience ends."""
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, source.path, repo_type="dataset", revision=revision, allow_patterns=patterns)
    with quiet_hub():
        return Path(fetched(fetch))


def _refusal(source: Source, what: str, remedy: str, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [""])[0][:200]
    return DataError(f"{what} ({reason})" if reason else what, where=source.path, remedy=remedy)
