"""Loading base models and tokenizers: a folder, a Hugging Face id, or the embedded model.

In: what the recipe says of the model. Out: a transformers model and tokenizer, in eval mode, on the device.
safetensors only; nothing is unpickled, no code of a model's repository is run that the command line did not allow
(`trust.py`), and a weight that the file lacks is an error, never a fresh random one. Must not know: adapters, data,
stages.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tunesmith.errors import ModelError, TunesmithError
from tunesmith.model.added_tokens import AddedTokens, add_tokens, make_room
from tunesmith.model.download import download
from tunesmith.model.memory import give_back_large_blocks
from tunesmith.model.quantized import loading_settings, prepare_layers
from tunesmith.model.reward import finish_head, refuse_classifier, without_head
from tunesmith.model.trust import check_folder, refuse_pickles, refused_code, runs_code
from tunesmith.recipe.models import Model
from tunesmith.recipe.resources import embedded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own warnings and progress bars: what matters in them is checked and said by us."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def model_folder(model: Model) -> Path:
    """The local folder of a model; a Hugging Face id is downloaded (data files only) to the hub's cache first."""
    inside = embedded(model.path)
    folder = inside if inside is not None else Path(model.path).expanduser()
    if folder.is_dir():
        return folder
    if inside is not None or folder.exists() or model.path.startswith((".", "/", "~")) or model.path.count("/") != 1:
        raise ModelError(
            "no such model folder",
            where=model.path,
            remedy="Give a folder with config.json and *.safetensors, or a Hugging Face id such as Qwen/Qwen2.5-0.5B.",
        )
    return download(model)


def _check_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError("the folder has no config.json", where=str(folder), remedy="Give a Hugging Face model folder.")
    if any(folder.glob("*.safetensors")):
        return
    refuse_pickles(folder)
    raise ModelError(
        "the folder has no weights (*.safetensors)",
        where=str(folder),
        remedy="Copy the weights there. Of a hub model only safetensors are fetched; one that has only pickles "
        "(pytorch_model.bin) has to be converted first.",
    )


@contextmanager
def _loading(what: str, folder: Path, *, remedy: str) -> Iterator[None]:
    """Turn whatever a library makes of a folder into a ModelError: its files may be anything."""
    try:
        with quiet_transformers():
            yield
    except (TunesmithError, MemoryError):
        raise
    except Exception as problem:
        reason = next(iter(str(problem).splitlines()), "") or type(problem).__name__
        remedy = refused_code(folder) or remedy
        raise ModelError(f"the {what} cannot be loaded: {reason}", where=str(folder), remedy=remedy) from problem


def load_config(model: Model) -> tuple[PreTrainedConfig, bool]:
    """The configuration of a model, and whether code of its own is to be run. Raises ModelError."""
    folder = model_folder(model)
    check_folder(folder)
    with_code = runs_code(model, folder)
    with _loading("model's configuration", folder, remedy="Check config.json."):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=with_code)
    return config, with_code


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the tokens that its `chat_template` needs. Raises as `load_extended_tokenizer`."""
    return load_extended_tokenizer(model)[0]


def load_extended_tokenizer(model: Model) -> tuple[PreTrainedTokenizerBase, AddedTokens]:
    """The model's tokenizer, and the tokens that had to be added to it for the model's `chat_template`.

    Raises ModelError where there is none or it has no end-of-text token.
    """
    folder = model_folder(model)
    check_folder(folder)
    remedy = "The folder needs tokenizer.json (and tokenizer_config.json), or the older files of its kind."
    with _loading("tokenizer", folder, remedy=remedy):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=runs_code(model, folder))
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-text token, so a model could never learn to stop",
            where=str(folder),
            remedy='Name one in tokenizer_config.json, for example "eos_token": "</s>".',
        )
    return tokenizer, add_tokens(tokenizer, model.chat_template)


def forward_dtype(model: Model, device: torch.device) -> torch.dtype:
    """Type of the frozen weights and the forward: bfloat16 where the card has it, float32 on a CPU."""
    if model.dtype != "auto":
        return DTYPES[model.dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def load_extended_model(
    model: Model, *, device: torch.device, dtype: torch.dtype, scores: bool = False, head_seed: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, AddedTokens]:
    """Model and tokenizer, both with the tokens that the model's `chat_template` needs. Raises as their loaders."""
    tokenizer, added = load_extended_tokenizer(model)
    loaded = load_model(model, device=device, dtype=dtype, scores=scores, head_seed=head_seed)
    with quiet_transformers():
        make_room(loaded, len(tokenizer), added)
    return loaded, tokenizer, added


def load_model(
    model: Model, *, device: torch.device, dtype: torch.dtype, scores: bool = False, head_seed: int | None = None
) -> PreTrainedModel:
    """The model as its folder holds it, in eval mode on `device`; tokens that its tokenizer is given have no row yet.

    `scores`: as a reward model, its head drawn from `head_seed` where the folder is a language model's; without a seed
    the folder must hold one. Raises ModelError for absent, pickled, missing or left-over weights.
    """
    folder = model_folder(model)
    _check_weights(folder)
    config, with_code = load_config(model)
    if scores:
        config.num_labels = 1
    else:
        refuse_classifier(config, str(folder))
    loader = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    settings: dict[str, object] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": with_code}
    if model.quantization != "none":
        give_back_large_blocks(device)  # else what the unquantized weights took stays, in gaps
        settings["quantization_config"] = loading_settings(model.quantization, dtype)
        settings["device_map"] = {"": device}
    with _loading("model", folder, remedy="Check config.json and the weights."):
        pair: tuple[PreTrainedModel, dict[str, list[str]]] = loader.from_pretrained(  # type: ignore[assignment]
            folder, config=config, output_loading_info=True, **settings
        )
        loaded, info = pair
    lacking = info["missing_keys"]
    if scores:
        lacking = without_head(lacking, config, may_draw=head_seed is not None)
    for what, names in (("lacks", lacking), ("does not fit", info["mismatched_keys"])):
        if names:
            shown = ", ".join(sorted(str(name) for name in names)[:3])
            raise ModelError(
                f"the weights file {what} {len(names)} tensors of the model ({shown}); they would start at random",
                where=str(folder),
                remedy="The weights belong to another model or are not complete: copy them again.",
            )
    if model.quantization == "none":
        loaded.to(device)  # type: ignore[arg-type]  # its decorator hides the signature
    else:
        prepare_layers(loaded)
        _let_go_of_files(loaded)
    loaded.eval()
    if scores:
        finish_head(loaded, config, seed=head_seed, where=str(folder))
    return loaded


def _let_go_of_files(model: PreTrainedModel) -> None:
    """Copy what is left in memory of the weights' files, so that nothing keeps them mapped.

    On a CPU weights that need no conversion stay where the file lies in memory. Beside quantized ones that is the
    embeddings and norms, and for their sake the whole unquantized file would count as used.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and tensor.is_floating_point():
                tensor.data = tensor.detach().clone()
    gc.collect()  # loading leaves cycles that hold the file too
