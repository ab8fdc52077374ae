"""A stage's files to trees, with an account of every row.

In: a stage of the recipe, a renderer. Out: training, held-out and replay trees, ledger, notes to print; or one
DataError that says which rows cannot be used and why. Prepared rows are cached by content: the second start reads
them. Must not know: models, training, the command line.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic.main import IncEx

from tunesmith.data.build import StageBuild
from tunesmith.data.cache import cache_key, cached, default_cache_folder, unfinished_folder
from tunesmith.data.examples import ExampleFile
from tunesmith.data.formats import Decoded, plan_format, to_examples
from tunesmith.data.kept import num_kept, remove_unfinished
from tunesmith.data.ledger import Ledger, Split
from tunesmith.data.mismatch import mismatch
from tunesmith.data.notes import closing_notes
from tunesmith.data.reading import StageReader, StageRecipe, Tell, check_rows, refuse_empty
from tunesmith.data.render import Renderer
from tunesmith.data.shape import balance_notes, shape_of
from tunesmith.data.sources import OpenedSource, open_source, read_rows
from tunesmith.data.store import TreeStore
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Tree
from tunesmith.errors import DataError
from tunesmith.recipe.models import SftStage, Source
from tunesmith.recipe.preferences import RewardStage
from tunesmith.recipe.stages import RowKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIBRARIES = ("transformers", "tokenizers", "jinja2")  # what renders and tokenizes besides our own code
KEY_FIELDS = (
    *("train", "heldout", "heldout_fraction", "replay", "max_length", "too_long", "train_on"),
    *("on_bad_row", "max_bad_rows", "duplicates"),
)
# The hash of a source's content knows the commit; a recipe that names it shares the entry of one that does not.
_REVISION: IncEx = {"__all__": {"revision": True}}
NOT_IN_KEY: IncEx = {"train": _REVISION, "heldout": _REVISION, "replay": {"sources": _REVISION}}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a stage trains and evaluates on; the trees lie on disk and are read as they are used.

    `heldout_examples` are the examples behind `heldout`, in the order of their rows. `sources` holds the content
    hash of every source, `revisions` the commit of every hub data set, `key` names the cache entry.
    """

    train: Sequence[Tree]
    heldout: Sequence[Tree]
    replay: Sequence[Tree]
    heldout_examples: Sequence[Example]
    ledger: Ledger
    notes: list[str]
    sources: Mapping[str, str]
    revisions: Mapping[str, str]
    key: str = ""


def stage_renderer(stage: StageRecipe, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Renderer:
    """The renderer that a stage's rows are prepared with."""
    train_on = stage.train_on if isinstance(stage, SftStage) else "assistant"
    reads_end = isinstance(stage, RewardStage)
    return Renderer(
        tokenizer, template, stage.max_length, too_long=stage.too_long, train_on=train_on, reads_end=reads_end
    )


def prepare_stage(
    stage: StageRecipe,
    renderer: Renderer,
    *,
    workers: int = 0,
    tell: Tell = lambda text: None,
    cache_folder: Path | None = None,
    revisions: Mapping[str, str] | None = None,
    between: Callable[[], None] = lambda: None,
) -> Prepared:
    """Reads, decodes, splits and renders every source of a stage, or finds that done before.

    `workers`: processes, 0 for one a core where it pays; `tell` is told of progress through large sources;
    `revisions`: the commits that an earlier start of the run read, of hub data sets for which the recipe names none;
    `between`: called between chunks, it may raise to stop. Of large sources the chunks that were done are kept,
    whatever ended the start, and the next one takes them: the bytes are those of an unbroken one.
    Raises DataError: a source that cannot be read, malformed rows (up to 20 at once), a format that does not
    suit the method, or no row left to train on (with the lengths, where length is why).
    """
    sources = _opened(stage, revisions or {})
    shas = {opened.name: opened.content_sha() for _, opened in sources}
    key = cache_key(
        {
            "shape": asdict(shape_of(stage)),
            "stage": stage.model_dump(mode="json", include=set(KEY_FIELDS), exclude=NOT_IN_KEY),
            "sources": shas,
            "max_length": renderer.max_length,
            **({"reads": "end"} if renderer.reads_end else {}),
            "template": renderer.template.sha,
            "tokenizer": tokenizer_sha(renderer.tokenizer),
            "libraries": {name: version(name) for name in LIBRARIES},
        }
    )

    def make(folder: Path) -> dict[str, object]:
        return {"notes": _make(folder, stage, renderer, sources, key=key, workers=workers, tell=tell, between=between)}

    folder, content = cached(key, make, root=cache_folder or default_cache_folder(), tell=tell)
    notes = content["notes"]
    assert isinstance(notes, list)
    train = TreeStore(folder / "train")
    return Prepared(
        train=train,
        heldout=TreeStore(folder / "heldout"),
        replay=TreeStore(folder / "replay"),
        heldout_examples=ExampleFile(folder / "heldout.jsonl"),
        ledger=Ledger(path=folder / "ledger.parquet", stage=stage.name),
        notes=[*map(str, notes), *balance_notes(stage, train.labels())],
        sources=shas,
        revisions={opened.name: opened.revision for _, opened in sources if opened.revision},
        key=key,
    )


def read_examples(source: Source, wanted: RowKind | None = None) -> Decoded:
    """A source's examples of one kind of rows (any, where None).

    Raises DataError for malformed rows and unfit formats.
    """
    rows = read_rows(source)
    decoded = to_examples(rows, source)
    if wanted is not None:
        check_rows(plan_format(rows, source), source, wanted)
    decoded.raise_bad(source.path)
    return decoded


def tokenizer_sha(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that the tokenizer does: its vocabulary, merges, normalizers, added and special tokens."""
    content = tokenizer.backend_tokenizer.to_str() + json.dumps(
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True
    )
    return hashlib.sha256(content.encode()).hexdigest()


def _opened(stage: StageRecipe, revisions: Mapping[str, str]) -> list[tuple[Split, OpenedSource]]:
    """Every source of the stage; held-out ones first, because what stands there is not trained."""
    replay = stage.replay.sources if isinstance(stage, SftStage) and stage.replay else []
    sides: tuple[tuple[Split, Sequence[Source]], ...] = (
        ("heldout", stage.heldout),
        ("train", stage.train),
        ("replay", replay),
    )
    return [(split, open_source(_pinned(source, revisions))) for split, sources in sides for source in sources]


def _pinned(source: Source, revisions: Mapping[str, str]) -> Source:
    """The source at the commit that was read before, where the recipe leaves it open."""
    if source.revision is not None or source.path not in revisions:
        return source
    return source.model_copy(update={"revision": revisions[source.path]})


def _make(
    folder: Path,
    stage: StageRecipe,
    renderer: Renderer,
    sources: Sequence[tuple[Split, OpenedSource]],
    *,
    key: str,
    workers: int,
    tell: Tell,
    between: Callable[[], None],
) -> list[str]:
    """Fills the folder; returns the notes."""
    kept_folder = unfinished_folder(folder.parent, key)
    if number := num_kept(kept_folder):
        tell(f"stage {stage.name}: {number} chunks of rows that an earlier start prepared are taken as they are")
    build = StageBuild(folder, merge=stage.duplicates == "merge")
    reader = StageReader(stage, renderer, build, workers=workers, tell=tell, kept_folder=kept_folder, between=between)
    try:
        reader.read_all(sources)
        build.finish(_weights(stage))
    except BaseException as error:
        build.abandon()
        remove_unfinished(kept_folder, os.getpid())
        if isinstance(error, DataError):
            shutil.rmtree(kept_folder, ignore_errors=True)  # the rows or the recipe must change first
        raise
    refuse_empty(build, stage)
    notes = [*reader.notes, *closing_notes(build, renderer.max_length)]
    for split in ("train", "heldout") if shape_of(stage).mismatched else ():
        between()
        notes += mismatch(folder / split, max_length=renderer.max_length)
    if stage.heldout_fraction and not build.sides["heldout"].num_kept:
        notes.append(f"WARNING: heldout_fraction {stage.heldout_fraction} held out no row.")
    if renderer.template.note and reader.any_chat:
        notes.insert(0, renderer.template.note)
    return notes


def _weights(stage: StageRecipe) -> list[float] | None:
    """The weights of the training sources, where they have any; a rule of the recipe says all or none."""
    weights = [source.weight for source in stage.train if source.weight is not None]
    if not weights:
        return None
    if len(weights) < len(stage.train):
        raise DataError(
            "some of the training sources have a weight and some have none",
            where=f"stage {stage.name}",
            remedy="Give every source a `weight`, or none.",
        )
    return weights
