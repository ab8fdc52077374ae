"""What a folder of somebody else's may make this process do: nothing but read the data files that lie in it.

In: the folder of a model, tokenizer or adapter, before any library opens a file of it. Out: nothing, or ModelError.
Also whether code of a model's repository may be run: only where the command line says so, for a pinned commit.
Must not know: torch, transformers, runs.

Checked: JSON is bounded in size and depth; whatever a file names lies inside the folder; weights are safetensors, also
those that an index names; no configuration names code to be fetched, or holds a secret that every result would repeat.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tunesmith.errors import ModelError
from tunesmith.redact import find_token
from tunesmith.runs.bounded import Json, as_mapping, parse_json, read_bytes

if TYPE_CHECKING:
    from tunesmith.recipe.models import Model

SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "adapter_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
"""Small JSON files, of which libraries take settings, names of files and names of classes."""
_VOCABULARIES = re.compile(r"(tokenizer|vocab|added_tokens|tekken)\.json\Z|(vocab|merges)\.txt\Z|\.(model|tiktoken)\Z")
READ = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".safetensors", ".py")
"""Endings of the files that a library may open by itself."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = ".safetensors.index.json"
TEMPLATES = "additional_chat_templates"

MAX_TEMPLATE_BYTES = 2**20  # the longest chat templates have 30,000
MAX_INDEX_BYTES = 64 * 2**20  # a model of 160,000 tensors has 15 MB
MAX_VOCABULARY_BYTES = 2**28  # the largest tokenizer.json has 35 MB

_NAMES_A_FILE = re.compile(r"(_file|_files|_path|_dir|_folder)\Z")
_NOT_OPENED = ("special_tokens_map_file", "name_or_path", "_name_or_path", "base_model_name_or_path")
"""Keys that only say where something once lay."""
_NAMES_CODE = re.compile(r"_?(attn|experts)_implementation(_internal)?\Z|megatron_(config|core)\Z|kernel_config\Z")
_HARMLESS_CODE = (None, False, "megatron.core")  # what peft itself writes
COMMIT = re.compile(r"[0-9a-f]{40}\Z")

_pinned_code: ContextVar[set[str] | None] = ContextVar("pinned_code", default=None)
"""None: no code is run. Else sha256 of every Python file of the pinned commits that were loaded since code was
allowed: a copy of it in a result may be run too."""


@contextmanager
def remote_code() -> Iterator[None]:
    """While the block lasts, code of a model's repository may be run at a pinned commit. For the command line only."""
    token = _pinned_code.set(set())
    try:
        yield
    finally:
        _pinned_code.reset(token)


def remote_code_allowed() -> bool:
    """Whether the command line said so."""
    return _pinned_code.get() is not None


def require_pinned(model: Model) -> None:
    """Raises ModelError where remote code is allowed and the model's revision is not a whole commit."""
    if remote_code_allowed() and COMMIT.match(model.revision or "") is None:
        raise ModelError(
            f"code is only run at a pinned commit, and model.revision is {model.revision or 'not set'}",
            where=f"--trust-remote-code, {model.path}",
            remedy="Read the code, then set model.revision to the 40-hex commit that you read.",
        )


def runs_code(model: Model, folder: Path) -> bool:
    """Whether the folder's own code is to be run: it has some, the command line allows it, the commit is pinned.

    Raises ModelError where it is allowed, but for no pinned commit, or the folder names code of another repository.
    """
    named, pinned = _named_code(folder), _pinned_code.get()
    if not named or pinned is None:
        return False
    elsewhere = [name for name in named if "--" in name]
    if elsewhere:
        raise ModelError(
            f"the configuration names code of another repository ({elsewhere[0]}), which no commit pins",
            where=str(folder),
            remedy="Use a model whose code lies beside its weights.",
        )
    shas = {hashlib.sha256(read_bytes(path)).hexdigest() for path in folder.glob("*.py")}
    if hub_commit(folder) is not None and hub_commit(folder) == model.revision:
        pinned.update(shas)
        return True
    if shas and shas <= pinned:
        return True  # a result of this run: it carries the code of its base
    require_pinned(model)
    raise ModelError(
        "code is only run from a pinned commit of a hub model, and this is a folder of its own",
        where=str(folder),
        remedy="Name the model by its Hugging Face id, with model.revision set to the 40-hex commit that you read.",
    )


def refused_code(folder: Path) -> str:
    """What to say where a folder could not be loaded and has code of its own; else ""."""
    if not _named_code(folder):
        return ""
    return (
        "The model brings code of its own, which is not run. If you have read it and trust it, set model.revision to "
        "the 40-hex commit that you read, and give --trust-remote-code on the command line."
    )


def hub_commit(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache; None for any other folder."""
    return folder.name if _hub_repository(folder) is not None and COMMIT.match(folder.name) else None


def check_folder(folder: Path) -> None:
    """Raises ModelError, naming file and key, where the folder is not harmless."""
    for path in _files(folder):
        try:
            _check_place(path, folder)
            _check_content(path, folder)
        except (ValueError, OSError, RuntimeError) as problem:  # RuntimeError: a loop of links
            raise ModelError(
                f"cannot be used: {problem}",
                where=str(path),
                remedy="Get the folder again from where it was published, or mend the file by hand.",
            ) from problem


def pickles_of(folder: Path) -> list[str]:
    """Names of the files that only unpickling could read."""
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)


def refuse_pickles(folder: Path) -> None:
    """Raises ModelError, saying how to convert, where a folder has pickled weights. They are never opened."""
    found = pickles_of(folder)
    if found:
        raise ModelError(
            f"the weights are pickle files ({', '.join(found[:3])}), which can run code when they are read",
            where=str(folder),
            remedy="They are not opened. Look for a safetensors version (on the hub often a branch or pull request "
            "of SFconvertbot), or, where you trust them, convert them once, in a container without network "
            "and secrets: load the folder there with its own library and `save_pretrained(NEW_FOLDER)`.",
        )


def _files(folder: Path) -> Iterator[Path]:
    names = sorted(path.name for path in folder.iterdir())
    yield from (folder / name for name in names if name.lower().endswith(READ))
    templates = folder / TEMPLATES
    if templates.is_symlink():
        yield templates
    elif templates.is_dir():
        yield from sorted(templates.glob("*.jinja"))


def _hub_repository(folder: Path) -> Path | None:
    """`models--org--name` of a snapshot in the hub's cache."""
    repository = folder.parent.parent
    inside = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if inside else None


def _check_place(path: Path, folder: Path) -> None:
    real = path.resolve(strict=True)
    repository = _hub_repository(folder)
    homes = [folder.resolve()] + ([(repository / "blobs").resolve()] if repository is not None else [])
    if not any(real.is_relative_to(home) for home in homes):
        raise ValueError(f"it is a link to {real}, outside of the folder")
    if not stat.S_ISREG(real.stat().st_mode):
        raise ValueError("it is no regular file")


def _check_content(path: Path, folder: Path) -> None:
    if path.name in SETTINGS:
        data = read_bytes(path)
        settings = as_mapping(parse_json(data))
        for key, value in _entries(settings):
            _check_entry(key, value, folder)
        if kind := find_token(data.decode("utf-8-sig")):
            raise ValueError(f"it holds a secret ({kind}), which every result would repeat; delete it there")
    elif path.name.endswith(INDEX):
        _check_index(as_mapping(parse_json(read_bytes(path, max_bytes=MAX_INDEX_BYTES))))
    elif path.suffix in (".jinja", ".py"):
        _check_size(path, MAX_TEMPLATE_BYTES)
    elif _VOCABULARIES.search(path.name):
        _check_size(path, MAX_VOCABULARY_BYTES)


def _check_size(path: Path, limit: int) -> None:
    if path.stat().st_size > limit:
        raise ValueError(f"it has more than {limit:,} bytes")


def _entries(settings: Mapping[str, Json]) -> Iterator[tuple[str, Json]]:
    """Every key with its value, at every depth."""
    waiting: list[Json] = [dict(settings)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _check_entry(key: str, value: Json, folder: Path) -> None:
    if _NAMES_CODE.search(key) and value not in _HARMLESS_CODE:
        named = list(value.values()) if isinstance(value, dict) else [value]
        if "megatron" in key or "kernel" in key or any(isinstance(each, str) and "/" in each for each in named):
            raise ValueError(f"{key}: {str(value)[:80]!r} names code to be loaded")
    if key == "transformers_weights" and not str(value or ".safetensors").endswith(".safetensors"):
        raise ValueError(f"{key}: {value!r} is no safetensors file")
    if (_NAMES_A_FILE.search(key) or key == "transformers_weights") and key not in _NOT_OPENED:
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and name and _leaves(name, folder):
                raise ValueError(f"{key}: {name!r} lies outside of the folder")


def _leaves(name: str, folder: Path) -> bool:
    """Whether a name leads out of the folder. An absolute one counts where it exists: many tokenizers still say where
    their files lay on the machine that saved them."""
    pure = PurePosixPath(name)
    if ".." in pure.parts or name.startswith("~"):
        return True
    if not pure.is_absolute():
        return False  # the files themselves are checked where they lie
    try:
        return Path(name).exists() and not Path(name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return True


def _check_index(index: Mapping[str, Json]) -> None:
    """An index names the files of the weights; a name that does not end in .safetensors would be unpickled."""
    names = index.get("weight_map")
    if not isinstance(names, dict):
        raise ValueError("it has no weight_map")
    for name in set(map(str, names.values())):
        if not name.endswith(".safetensors") or PurePosixPath(name).name != name:
            raise ValueError(f"weight_map: {name!r} is no safetensors file of the folder")


def _named_code(folder: Path) -> list[str]:
    """The classes of its own code that a folder's configurations name; empty where it has none, or cannot be read."""
    found: list[str] = []
    for name in SETTINGS:
        try:
            settings = as_mapping(parse_json(read_bytes(folder / name)))
        except (OSError, ValueError):
            continue
        named = settings.get("auto_map")
        groups = list(named.values()) if isinstance(named, dict) else [named]
        flat = [each for group in groups for each in (group if isinstance(group, list) else [group])]
        found += [each for each in flat if isinstance(each, str)]
    return found
