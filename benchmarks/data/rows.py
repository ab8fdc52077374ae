"""The rows of the data benchmark: real files, repeated with perturbations, as JSON lines.

In: the folder of real data, a count, a kind. Out: a file. Must not know: who reads it.

Every turn of every repetition begins with a number of its own, so that no two texts are equal and nobody's cache of
texts helps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def messages(shared: Path) -> list[list[dict[str, str]]]:
    """Every real file that holds plain answers, as messages: single questions, and up to seven of them."""
    found = [row["messages"] for row in json.loads((shared / "pref" / "kto_en_demo.json").read_text())]
    for row in json.loads((shared / "sft" / "alpaca_en_demo.json").read_text()):
        question = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        found.append([{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}])
    with (shared / "sft" / "v1_sft_demo.jsonl").open() as lines:
        for line in lines:
            turns = json.loads(line)["messages"]
            found.append([{"role": turn["role"], "content": turn["content"][0]["value"]} for turn in turns])
    for row in json.loads((shared / "pref" / "dpo_en_demo.json").read_text()):
        turns = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        found.append([*turns, {"role": "assistant", "content": row["chosen"]["value"]}])
    plain = [[{"role": turn["role"], "content": turn["content"]} for turn in row] for row in found]
    return [row for row in plain if row[-1]["role"] == "assistant" and all(turn["content"].strip() for turn in row)]


def pairs(shared: Path) -> list[dict[str, list[dict[str, str]]]]:
    """Prompts with two answers: Intel's orca pairs, and an Alpaca-style file."""
    rows = []
    with (shared / "pref" / "orca_dpo_openai_format.jsonl").open() as lines:
        for line in lines:
            row = json.loads(line)
            rows.append((row["input"]["messages"], row["preferred_output"], row["non_preferred_output"]))
    for row in json.loads((shared / "pref" / "dpo_en_demo.json").read_text()):
        prompt = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        sides = ([{"role": "assistant", "content": row[name]["value"]}] for name in ("chosen", "rejected"))
        rows.append((prompt, *sides))
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in rows
        if chosen != rejected and all(turn["content"].strip() for turn in (*prompt, *chosen, *rejected))
    ]


def perturbed(kind: str, shared: Path) -> Iterator[dict[str, object]]:
    """Rows without end."""
    if kind == "sft":
        for number, row in enumerate(cycle(messages(shared))):
            yield {"messages": _numbered(row, number)}
    for number, pair in enumerate(cycle(pairs(shared))):
        yield {name: _numbered(turns, number) for name, turns in pair.items()}


def _numbered(turns: list[dict[str, str]], number: int) -> list[dict[str, str]]:
    return [turn | {"content": f"({number}.{place}) {turn['content']}"} for place, turn in enumerate(turns)]


def write_rows(path: Path, kind: str, *, shared: Path, num_rows: int = 0, num_bytes: int = 0) -> int:
    """Writes so many rows, or rows until the file has so many bytes; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in perturbed(kind, shared) if num_bytes else islice(perturbed(kind, shared), num_rows):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
            if num_bytes and count % 1000 == 0 and file.tell() >= num_bytes:
                break
    return count
