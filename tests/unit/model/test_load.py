"""Loading a model folder that is hostile or broken: a ModelError that says what to do, and nothing is run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.folders import make_model_folder
from tunesmith.errors import ModelError
from tunesmith.model.load import load_model, load_tokenizer
from tunesmith.model.policy import Weights, policy_for_training
from tunesmith.model.shapes import shapes_for_training
from tunesmith.recipe.models import Lora, Model

CODE = (
    "import pathlib\npathlib.Path({canary!r}).write_text('the code ran')\nclass OwnConfig: pass\nclass OwnModel: pass\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path / "model")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def load(folder: Path) -> object:
    return load_model(Model(path=str(folder)), device=torch.device("cpu"), dtype=torch.float32)


ENTRIES: dict[str, Callable[[Path], object]] = {
    "model": load,
    "tokenizer": lambda folder: load_tokenizer(Model(path=str(folder))),
    "shapes": lambda folder: shapes_for_training(Model(path=str(folder)), Lora(r=2), dtype=torch.float32),
}


def with_code(folder: Path) -> Path:
    """Gives the folder code of its own; returns the file that appears where the code is run."""
    canary = folder.parent / "canary"
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (folder / name).write_text(CODE.format(canary=str(canary)))
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    change(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=own)
    tokens = {"AutoTokenizer": [None, "tokenization_own.OwnConfig"]}
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=tokens)
    return canary


@pytest.mark.parametrize("entry", ENTRIES)
def test_code_of_a_model_is_not_run(folder: Path, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = with_code(folder)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask, and take this for an answer
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    try:
        ENTRIES[entry](folder)
    except ModelError as refusal:
        assert "--trust-remote-code" in str(refusal)
    assert not canary.exists()


def test_a_model_with_code_is_refused_with_what_to_do(folder: Path) -> None:
    with_code(folder)
    with pytest.raises(ModelError, match=r"(?s)model brings code of its own.*40-hex commit.*--trust-remote-code"):
        load(folder)


def test_weights_that_an_index_has_unpickled_are_not_opened(folder: Path) -> None:
    """A safetensors index beside a pickle: transformers alone would open the pickle."""
    canary = folder.parent / "canary"
    torch_file = b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    (folder / "pytorch_model.bin").write_bytes(torch_file)
    (folder / "model.safetensors").rename(folder / "unused.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="no safetensors file of the folder"):
        load(folder)
    assert not canary.exists()


def test_pickles_alone_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"(?s)pickle files \(pytorch_model.bin\).*They are not opened"):
        load(folder)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_checks_the_folder_first(folder: Path, entry: str) -> None:
    change(folder / "tokenizer_config.json", merges_file="../../.env")
    with pytest.raises(ModelError, match=r"merges_file: '\.\./\.\./\.env' lies outside"):
        ENTRIES[entry](folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{}"),
        ("config.json", b'{"model_type": 3}'),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}'),
        ("config.json", b'{"model_type": "llama", "hidden_size": -1, "num_hidden_layers": 1}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", b'{"added_tokens": 3, "model": {"type": "BPE"}}'),
        ("tokenizer_config.json", b'{"tokenizer_class": 3}'),
        ("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": []}'),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
    ],
)
def test_broken_files_are_the_users_matter(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(Model(path=str(folder)))
        load(folder)
    assert str(folder) in str(caught.value)


class Watched:
    """An audit hook cannot be removed, so it is told when to listen: to unpickling, and to opened files."""

    def __init__(self) -> None:
        self.listening = False
        self.heard: list[str] = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.listening and event in ("pickle.find_class", "open"):
            self.heard.append(f"{event} {arguments[0]}")


def test_nothing_is_unpickled_on_the_way(folder: Path) -> None:
    planted = ["optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"]
    for name in planted:
        (folder / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    watched = Watched()
    watched.listening = True
    try:
        policy_for_training(Weights(Model(path=str(folder))), Lora(r=2), device=torch.device("cpu"), seed=0)
    finally:
        watched.listening = False
    assert any(each.endswith("config.json") for each in watched.heard), "the hook heard nothing"
    assert not [each for each in watched.heard if each.startswith("pickle") or each.endswith(tuple(planted))]


def test_a_pipe_in_the_place_of_weights_is_not_waited_for(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ModelError, match="no regular file"):
        load(folder)
