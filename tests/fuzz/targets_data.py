"""What reads recipes, rows, templates and prepared rows, each given damaged ones.

In: a folder for what the cases share. Out: targets. Must not know: run folders.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from tests.fuzz.mutate import damage_bytes, damage_value, dumps
from tests.fuzz.run import Target
from tests.support.folders import CHATML, make_tokenizer
from tunesmith.data.prepare import Prepared, prepare_stage, stage_renderer
from tunesmith.data.store import digest_of
from tunesmith.data.template import ChatTemplate, choose_template
from tunesmith.recipe.diff import diff_recipes
from tunesmith.recipe.explain import dump_resolved
from tunesmith.recipe.load import load_recipe, parse_recipe
from tunesmith.recipe.models import CompletionStage, DpoStage, SftStage
from tunesmith.recipe.resources import find_recipe, shipped_recipes

TURNS = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This one."}]
CALL = {"type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
FORMATS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": TURNS}, {"messages": [{"role": "system", "content": "Be short."}, *TURNS, *TURNS]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}]}],
    "alpaca": [{"instruction": "Say which.", "input": "of two", "output": "That."}],
    "question_answer": [{"question": "Which?", "answer": "This."}],
    "prompt_completion": [{"prompt": "Which?", "completion": " This."}, {"prompt": TURNS[:1], "completion": TURNS[1:]}],
    "text": [{"text": "The sea is blue."}],
    "preference": [
        {"prompt": "Which?", "chosen": "This.", "rejected": "No."},
        {"prompt": "Which?", "chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "No."}]},
    ],
    "transcripts": [
        {"chosen": "\n\nHuman: Which?\n\nAssistant: This.", "rejected": "\n\nHuman: Which?\n\nAssistant: No."}
    ],
    "preferred_output": [
        {
            "input": {"messages": TURNS[:1]},
            "preferred_output": TURNS[1:],
            "non_preferred_output": [{"role": "assistant", "content": "No."}],
        }
    ],
    "ranked": [{"prompt": "Which?", "responses": [{"text": "This.", "score": 2}, {"text": "No.", "score": 1}]}],
    "labeled": [{"prompt": "Which?", "completion": "This.", "label": True}],
    "tools": [{"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [CALL]}],
}
METHODS = {
    "sft": lambda source, **more: SftStage(name="sft", train=[source], **more),
    "completion": lambda source, **more: CompletionStage(name="text", train=[source], **more),
    "dpo": lambda source, **more: DpoStage(name="dpo", train=[source], **more),
}
PREFERENCES = ("preference", "transcripts", "preferred_output", "ranked", "labeled")


def data_targets(folder: Path) -> list[Target]:
    """Their shared parts are made here, once."""
    tokenizer = make_tokenizer()
    template = choose_template(tokenizer, None)
    recipes = [find_recipe(name).read_bytes() for name in shipped_recipes()]
    rows = Rows(tokenizer, template, folder / "prepared")
    return [
        Target("recipe", 0.28, lambda case, draw: _recipe(case, draw, recipes)),
        Target("recipe_as_values", 0.08, _recipe_values),
        Target("rows", 0.28, rows.read_damaged),
        Target("prepared_rows", 0.04, rows.read_prepared),
        Target("chat_template", 0.02, lambda case, draw: _template(case, draw)),
    ]


def _recipe(folder: Path, draw: random.Random, recipes: list[bytes]) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(damage_bytes(draw.choice(recipes), draw))
    overrides = [_override(draw) for _ in range(draw.choice((0, 0, 0, 1, 2)))]
    loaded = load_recipe(path, overrides)
    written = folder / "again.yaml"
    written.write_text(dump_resolved(loaded), "utf-8")
    assert diff_recipes(loaded.recipe, load_recipe(written).recipe) == [], "what is written is not what was read"


def _override(draw: random.Random) -> str:
    keys = ["seed", "stages.dpo.beta", "stages[0].train[0].path", "model.path", "name", "stages.sft.epochs", "compare"]
    text = f"{draw.choice(keys)}={draw.choice(['1', '0.1', 'x', 'null', '[1, 2]', '{a: b}', '-1', '1e999', ''])}"
    return damage_bytes(text.encode(), draw).decode("utf-8", "replace") if draw.random() < 0.5 else text


def _recipe_values(folder: Path, draw: random.Random) -> None:
    source = {"path": "a.jsonl", "columns": {"prompt": "question"}, "limit": 3}
    stages = [
        {"name": "sft", "method": "sft", "train": [source], "tuning": {"kind": "lora", "r": 4}, "epochs": 2},
        {"name": "dpo", "method": "dpo", "train": [source], "heldout": [source], "beta": 0.1},
    ]
    recipe = {"name": "x", "model": {"path": "m"}, "stages": stages, "compare": {"prompts": [source]}, "seed": 1}
    values = damage_value(recipe, draw)
    path = folder / "recipe.yaml"
    path.write_bytes(dumps(values))  # JSON is YAML
    load_recipe(path)
    parse_recipe(values)


def _template(folder: Path, draw: random.Random) -> None:
    path = folder / "t.jinja"
    path.write_bytes(damage_bytes(CHATML.encode(), draw))
    tokenizer = make_tokenizer()
    template = choose_template(tokenizer, str(path))
    source = {"path": str(_write_jsonl(folder / "a.jsonl", FORMATS["messages"]))}
    stage = SftStage.model_validate({"name": "sft", "train": [source]}, strict=False)
    prepare_stage(stage, stage_renderer(stage, tokenizer, template), workers=1, cache_folder=folder / "cache")


class Rows:
    """Rows of every format in files of every kind, and a cache of prepared ones."""

    def __init__(self, tokenizer: Any, template: ChatTemplate, prepared: Path) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._prepared = prepared
        prepared.mkdir(parents=True)
        self._whole = _write_jsonl(prepared / "whole.jsonl", FORMATS["messages"] * 3)
        self._entry = self._prepare(str(self._whole), "sft", prepared / "cache")
        self._digest = digest_of(self._entry.train)

    def _prepare(self, path: str, method: str, cache: Path, **more: Any) -> Prepared:
        stage = METHODS[method]({"path": path}, max_length=256, **more)
        return prepare_stage(
            stage, stage_renderer(stage, self._tokenizer, self._template), workers=1, cache_folder=cache
        )

    def read_damaged(self, folder: Path, draw: random.Random) -> None:
        """Rows of one format, some of them changed, in a file of one kind, its bytes changed or not."""
        name = draw.choice(list(FORMATS))
        rows: list[Any] = [draw.choice(FORMATS[name]) for _ in range(draw.choice((1, 3, 6)))]
        by_bytes = draw.random() < 0.5
        if not by_bytes:
            rows = [damage_value(row, draw) if draw.random() < 0.5 else row for row in rows]
        kind = draw.choice(
            [".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".jsonl.gz", ".jsonl.zst"]
        )
        data = _encoded(kind, rows)
        path = folder / f"rows{kind}"
        path.write_bytes(damage_bytes(data, draw) if by_bytes else data)
        method = "dpo" if name in PREFERENCES else "completion" if name == "text" else "sft"
        more = {
            "on_bad_row": draw.choice(("stop", "drop")),
            "max_bad_rows": 1.0,
            "heldout_fraction": draw.choice((0.0, 0.3)),
        }
        prepared = self._prepare(str(path), method, folder / "cache", **more)
        digest_of(prepared.train)
        prepared.ledger.summary()
        list(prepared.heldout_examples)

    def read_prepared(self, folder: Path, draw: random.Random) -> None:
        """A damaged entry of the cache is made again: the trees are what they were."""
        shutil.copytree(self._prepared / "cache", folder / "cache")
        files = sorted(path for path in (folder / "cache").rglob("*") if path.is_file())
        path = draw.choice(files)
        path.write_bytes(damage_bytes(path.read_bytes(), draw))
        prepared = self._prepare(str(self._whole), "sft", folder / "cache")
        assert digest_of(prepared.train) == self._digest, f"{path.name} was damaged, and other trees were read"
        assert len(prepared.ledger) == len(self._entry.ledger)


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_bytes(_encoded(".jsonl", rows))
    return path


def _encoded(kind: str, rows: list[Any]) -> bytes:
    """Rows as a file of one kind holds them; what a kind cannot hold is written as text."""
    lines = b"\n".join(dumps(row) for row in rows) + b"\n"
    if kind == ".json":
        return dumps(rows)
    if kind == ".jsonl.gz":
        return gzip.compress(lines, mtime=0)
    if kind == ".jsonl.zst":
        return bytes(pa.Codec("zstd").compress(lines, asbytes=True))
    if kind in (".txt", ".md"):
        return b"# " + lines
    if kind == ".jsonl":
        return lines
    return _table(kind, [row if isinstance(row, dict) else {"row": row} for row in rows])


def _table(kind: str, rows: list[dict[str, Any]]) -> bytes:
    names = list(dict.fromkeys(_utf8(str(name)) for row in rows for name in row))
    texts = pa.table({name: [_cell(row.get(name)) for row in rows] for name in names})
    file = io.BytesIO()
    if kind != ".parquet":
        options = pyarrow.csv.WriteOptions(delimiter="\t" if kind == ".tsv" else ",")
        pyarrow.csv.write_csv(texts, file, options)
        return file.getvalue()
    try:  # nested cells as they are, where all rows have one shape that Parquet knows
        pyarrow.parquet.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), file)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
        file = io.BytesIO()
        pyarrow.parquet.write_table(texts, file)
    return file.getvalue()


def _cell(value: Any) -> str:
    return _utf8(value if isinstance(value, str) else json.dumps(value))


def _utf8(text: str) -> str:
    """Without halves of surrogate pairs, which these kinds of file cannot hold."""
    return text.encode("utf-8", "replace").decode()
