"""Merging: the adapter folded into the weights, written as a plain transformers model, and proved by its logits.

In: a run folder and a stage's name. Out: a folder that anything of Hugging Face's loads. A quantized base is
dequantized first: merging into other weights than those that were trained with gives another model.
Must not know: training, comparison.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.errors import ModelError, NumericsError, RunFolderError
from tunesmith.model.load import load_model, load_tokenizer
from tunesmith.model.machine import Machine
from tunesmith.model.policy import Policy, Weights, merged_model, save_policy
from tunesmith.model.stage import LoadedStage, load_stage
from tunesmith.recipe.models import Model
from tunesmith.runs.atomic import make_folder, publish_folder, write_json
from tunesmith.runs.folder import open_run

PROBES = ("Hello.", "Write one sentence about the sea.", "1, 2, 3, 4")
KL_LIMIT = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest mean KL in nats a token between adapter and merged model: rounding of the merged weights' type."""


@torch.inference_mode()
def _probe(model: torch.nn.Module, probes: list[list[int]]) -> list[Tensor]:
    device = next(model.parameters()).device
    return [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in probes]


def merge_run(run: Path, stage: str | None = None, to: Path | None = None) -> Path:
    """Write the merged model of a stage into `to`, by default `merged/STAGE` in the run; returns the folder.

    The model is read back and its logits compared with the adapter's. Raises RunFolderError where `to` exists,
    NumericsError where the two models differ; then nothing is left at `to`.
    """
    folder = open_run(run)
    loaded = load_stage(run, stage)
    target = to if to is not None else folder.path / "merged" / loaded.name
    if target.exists():
        raise RunFolderError("exists already", where=str(target), remedy="Give another folder with --to, or remove it.")
    probes = [loaded.renderer.prompt_ids(text) for text in PROBES]
    probes = [ids for ids in probes if ids]
    wanted = _probe(loaded.model, probes)
    make_folder(target.parent)
    with publish_folder(target) as temporary:
        _write(loaded, temporary)
        dtype = loaded.model.dtype
        del loaded
        gc.collect()
        kl, largest = _compare(temporary, dtype, probes, wanted)
        write_json(temporary / "merge.json", {"mean_kl_nats": kl, "largest_logit_difference": largest})
    return target


def _write(loaded: LoadedStage, folder: Path) -> None:
    policy = Policy(merged_model(loaded.policy), loaded.tokenizer, Weights(loaded.policy.weights.full))
    save_policy(policy, folder, stop_ids=loaded.stop_ids, chat_template=loaded.renderer.template.source)


def _compare(folder: Path, dtype: torch.dtype, probes: list[list[int]], wanted: list[Tensor]) -> tuple[float, float]:
    """Mean KL(adapter || merged) in nats a token and the largest logit difference, after reading the folder back."""
    saved = Model(path=str(folder))
    model = load_model(saved, device=Machine.detect().device, dtype=dtype)
    if load_tokenizer(saved).chat_template is None:
        raise ModelError("the merged model's tokenizer lost its chat template", where=str(folder))
    found = _probe(model, probes)
    kls: list[Tensor] = []
    for got_LV, want_LV in zip(found, wanted, strict=True):
        want_log = want_LV.double().log_softmax(-1)
        kls.append((want_log.exp() * (want_log - got_LV.double().log_softmax(-1))).sum(-1))
    kl = float(torch.cat(kls).mean())
    largest = max(float((got - want).abs().max()) for got, want in zip(found, wanted, strict=True))
    limit = KL_LIMIT.get(dtype, KL_LIMIT[torch.float32])
    if not kl <= limit:
        raise NumericsError(
            f"the merged model is not the trained one: mean KL {kl:.2e} nats a token, limit {limit:.0e}",
            where=str(folder),
            remedy="Keep the adapter, or merge in float32 (`model.dtype: float32`).",
        )
    return kl, largest
