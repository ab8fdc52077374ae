"""Folders that want more than to be read (TRAPS S1, S4, S9): refused before a library opens a file of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tunesmith.errors import ModelError
from tunesmith.model.trust import check_folder, hub_commit, refuse_pickles, remote_code, require_pinned, runs_code
from tunesmith.recipe.models import Model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.env").write_text("SECRET=1")
    return tmp_path / "model"


def write(folder: Path, name: str, **values: object) -> None:
    (folder / name).write_text(json.dumps(values))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_folder(folder)
    return str(caught.value)


def snapshot(root: Path, commit: str = COMMIT) -> Path:
    """A folder of the hub's cache: links into the blobs of the same repository."""
    repository = root / "models--org--own"
    folder = repository / "snapshots" / commit
    (repository / "blobs").mkdir(parents=True)
    folder.mkdir(parents=True)
    for name, text in {"config.json": json.dumps({"auto_map": AUTO_MAP}), "modeling_own.py": "print(1)\n"}.items():
        (repository / "blobs" / name).write_text(text)
        (folder / name).symlink_to(Path("../../blobs") / name)
    return folder


@pytest.mark.parametrize("name", ["../secret.env", "~/.ssh/id_rsa", "sub/../../secret.env"])
@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "tokenizer_file", "spm_file", "sp_model_path"])
def test_names_that_lead_out_are_refused(folder: Path, key: str, name: str) -> None:
    write(folder, "tokenizer_config.json", **{key: name})
    assert f"{key}: {name!r} lies outside of the folder" in refusal(folder)


def test_an_absolute_name_is_refused_where_something_is_there(folder: Path) -> None:
    write(folder, "tokenizer_config.json", vocab_file=str(folder.parent / "secret.env"))
    assert "lies outside" in refusal(folder)
    write(folder, "tokenizer_config.json", vocab_file=str(folder / "vocab.txt"), tokenizer_file="/gone/tokenizer.json")
    check_folder(folder)


def test_names_in_lists_and_below_count(folder: Path) -> None:
    write(folder, "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json", "tokenizer.1/../../x.json"])
    assert "fast_tokenizer_files" in refusal(folder)
    write(folder, "tokenizer_config.json", inner=[{"vocab_file": "../secret.env"}])
    assert "vocab_file" in refusal(folder)


def test_old_notes_of_where_files_lay_are_no_harm(folder: Path) -> None:
    where = str(folder.parent / "secret.env")
    write(folder, "tokenizer_config.json", special_tokens_map_file=where, name_or_path=where)
    check_folder(folder)


@pytest.mark.parametrize(
    "name", ["vocab.json", "model.safetensors", "config.json", "chat_template.jinja", "merges.txt"]
)
def test_a_link_that_leads_out_is_refused(folder: Path, name: str) -> None:
    (folder / name).symlink_to(folder.parent / "secret.env")
    assert "outside of the folder" in refusal(folder)


def test_a_link_within_the_folder_and_a_linked_folder_are_fine(folder: Path) -> None:
    write(folder, "vocab.json")
    (folder / "tokenizer.json").symlink_to("vocab.json")
    check_folder(folder)
    link = folder.parent / "link"
    link.symlink_to(folder)
    check_folder(link)


def test_the_hubs_links_are_fine_but_only_into_their_own_repository(tmp_path: Path) -> None:
    found = snapshot(tmp_path)
    check_folder(found)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_text("{}")
    (found / "vocab.json").symlink_to(other / "x")
    assert "outside of the folder" in refusal(found)


def test_pipes_and_loops_are_refused_and_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")
    assert "no regular file" in refusal(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").symlink_to("config.json")
    assert "config.json: cannot be used" in refusal(folder)


@pytest.mark.parametrize(
    "weights", ["pytorch_model-1.bin", "../other.safetensors", "/etc/x.safetensors", "a/b.safetensors", None, 3]
)
def test_an_index_names_safetensors_of_the_folder_only(folder: Path, weights: object) -> None:
    """transformers unpickles whatever an index names that does not end in .safetensors."""
    write(folder, "model.safetensors.index.json", metadata={}, weight_map={"a": "x.safetensors", "b": weights})
    assert "is no safetensors file of the folder" in refusal(folder)


def test_other_weights_that_a_config_names_are_safetensors(folder: Path) -> None:
    write(folder, "config.json", transformers_weights="weights.pt")
    assert "transformers_weights" in refusal(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "evil/attention"},
        {"_attn_implementation_internal": "evil/attention"},
        {"text_config": {"attn_implementation": {"": "evil/attention"}}},
        {"experts_implementation": "evil/experts"},
        {"megatron_config": {"a": 1}},
        {"megatron_core": "os"},
        {"kernel_config": {"RMSNorm": "evil/norm:x"}},
    ],
)
def test_settings_that_name_code_are_refused(folder: Path, entry: dict[str, object]) -> None:
    write(folder, "config.json", **entry)
    assert "names code to be loaded" in refusal(folder)


def test_what_libraries_write_themselves_is_fine(folder: Path) -> None:
    write(folder, "adapter_config.json", megatron_config=None, megatron_core="megatron.core")
    write(folder, "config.json", attn_implementation="sdpa", _attn_implementation_autoset=True)
    check_folder(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "nested more than 64 deep"),
        (b"{" * 3, "property name"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe", "decode"),
        (b'{"a": "' + b"x" * (8 * 2**20) + b'"}', "more than 8,388,608 bytes"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "adapter_config.json"])
def test_settings_are_bounded(folder: Path, name: str, content: bytes, said: str) -> None:
    (folder / name).write_bytes(content)
    assert said in refusal(folder)


def test_templates_and_vocabularies_are_bounded(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"x" * (2**20 + 1))
    assert "more than 1,048,576 bytes" in refusal(folder)
    (folder / "chat_template.jinja").unlink()
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(2**28 + 1)  # no byte of it is on the disk
    assert "more than 268,435,456 bytes" in refusal(folder)


def test_a_secret_in_the_settings_is_not_copied_to_every_result(folder: Path) -> None:
    token = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4"
    write(folder, "tokenizer_config.json", use_auth_token=token)
    message = refusal(folder)
    assert "holds a secret (an access token)" in message and token not in message


def test_pickles_are_refused_with_what_to_do(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*(?s:.)*not opened(?s:.)*save_pretrained"):
        refuse_pickles(folder)


# --- code of a model's own


def model_of(folder: Path, revision: str | None = COMMIT) -> Model:
    return Model(path="org/own", revision=revision)


def test_code_is_not_run_without_the_command_line(tmp_path: Path) -> None:
    found = snapshot(tmp_path)
    assert not runs_code(model_of(found), found)


def test_code_is_run_at_a_pinned_commit_only(tmp_path: Path) -> None:
    found = snapshot(tmp_path)
    with remote_code():
        for revision in (None, "main", COMMIT[:12], COMMIT.upper()):
            with pytest.raises(ModelError, match="pinned commit"):
                runs_code(model_of(found, revision), found)
            with pytest.raises(ModelError, match=r"model\.revision is"):
                require_pinned(model_of(found, revision))
        assert runs_code(model_of(found), found)
    assert not runs_code(model_of(found), found)
    require_pinned(model_of(found, None))  # nothing to require where nothing is allowed


def test_a_folder_without_code_needs_no_trust(folder: Path) -> None:
    write(folder, "config.json", model_type="llama")
    with remote_code():
        assert not runs_code(Model(path=str(folder)), folder)


def test_code_of_a_plain_folder_is_run_only_where_it_equals_the_pinned(tmp_path: Path) -> None:
    found, result = snapshot(tmp_path), tmp_path / "result"
    result.mkdir()
    write(result, "config.json", auto_map=AUTO_MAP)
    (result / "modeling_own.py").write_text("print(1)\n")
    with remote_code():
        assert runs_code(model_of(found), found)
        assert runs_code(Model(path=str(result)), result)
        (result / "modeling_own.py").write_text("print(2)\n")
        with pytest.raises(ModelError, match="pinned commit"):
            runs_code(Model(path=str(result)), result)


def test_code_of_another_repository_is_never_run(tmp_path: Path) -> None:
    found = snapshot(tmp_path)
    (found / "config.json").unlink()
    write(found, "config.json", auto_map={"AutoModelForCausalLM": "evil/repo--modeling.Model"})
    with remote_code(), pytest.raises(ModelError, match="code of another repository"):
        runs_code(model_of(found), found)


def test_a_commit_is_known_by_the_hubs_folders_alone(tmp_path: Path) -> None:
    assert hub_commit(snapshot(tmp_path)) == COMMIT
    assert hub_commit(tmp_path / COMMIT) is None
    assert hub_commit(tmp_path / "models--a--b" / "snapshots" / "main") is None
