"""The commit of a base model on the hub: resolved once, when the run begins, and read from the manifest ever after.

In: a recipe, and the manifest of its run. Out: the recipe with the 40-hex commit in `model.revision`, so that every
reader of the run (resume, compare, chat, merge) takes the same files. Must not know: what lies in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tunesmith.errors import ModelError, ResumeError
from tunesmith.model.load import model_folder
from tunesmith.model.trust import COMMIT, hub_commit
from tunesmith.recipe.load import LoadedRecipe, Origin
from tunesmith.recipe.models import Model
from tunesmith.recipe.resources import embedded

KEY = "model_revision"


def is_on_hub(model: Model) -> bool:
    """Whether the model is named by an id of the hub, and not by a folder."""
    return embedded(model.path) is None and not Path(model.path).expanduser().exists() and model.path.count("/") == 1


def pinned(loaded: LoadedRecipe, manifest: Mapping[str, object]) -> LoadedRecipe:
    """The recipe at one commit of its model: the one that the run began on, else the one its revision means now.

    A local folder has no commit: its files' hashes are compared instead. Raises ModelError where there is no such
    model, ResumeError (3) where the commit that the run began on cannot be had any more.
    """
    model = loaded.recipe.model
    if not is_on_hub(model):
        return loaded
    begun = manifest.get(KEY)
    commit = _begun_on(model, begun)
    if commit is not None:
        _refuse_lost(model, commit)
    elif model.revision is not None and COMMIT.match(model.revision):
        return loaded
    else:
        commit = hub_commit(model_folder(model))
        if commit is None:
            return loaded
    named = model.revision or "the newest"
    recipe = loaded.recipe.model_copy(update={"model": model.model_copy(update={"revision": commit})})
    origin = Origin("recipe", f"the commit of {named} when the run began")
    return replace(loaded, recipe=recipe, origins={**loaded.origins, "model.revision": origin})


def pin_entry(asked: LoadedRecipe, taken: LoadedRecipe, manifest: Mapping[str, object]) -> dict[str, object]:
    """What the manifest says of the model's commit; nothing for a local folder. What was asked first stays."""
    model = taken.recipe.model
    if not is_on_hub(model) or model.revision is None:
        return {}
    if _begun_on(model, manifest.get(KEY)) is not None:
        return {KEY: manifest[KEY]}
    return {KEY: {"path": model.path, "asked": asked.recipe.model.revision, "commit": model.revision}}


def _begun_on(model: Model, begun: object) -> str | None:
    """The commit that the run has begun on, if the recipe still asks for the same."""
    if not isinstance(begun, dict) or begun.get("path") != model.path:
        return None
    commit = begun.get("commit")
    if not isinstance(commit, str) or not COMMIT.match(commit):
        return None
    return commit if model.revision in (begun.get("asked"), commit) else None


def _refuse_lost(model: Model, commit: str) -> None:
    try:
        model_folder(model.model_copy(update={"revision": commit}))
    except ModelError as error:
        raise ResumeError(
            f"the run began on commit {commit} of the model, which cannot be had: {error.what}",
            where=model.path,
            remedy="Check the network; another commit is another run: give it another `name`.",
        ) from error
