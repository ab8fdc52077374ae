"""Make the embedded quickstart: world, tokenizer, base model and data files.

    python tools/make_quickstart.py              everything, about ten minutes on one core
    python tools/make_quickstart.py --data-only  the data files, with the tokenizer that is there

In: nothing but the seeds in `tools.quickstart_world`. Out: the files under src/tunesmith/embedded/quickstart.
Data and tokenizer are the same on every machine; the weights agree up to the machine's rounding.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tools.quickstart_world import questions
from tools.quickstart_world.base import train_base
from tools.quickstart_world.texts import almanac_pages
from tools.quickstart_world.tokenizer import train_tokenizer
from tools.quickstart_world.world import World, make_world

FOLDER = Path(__file__).parents[1] / "src" / "tunesmith" / "embedded" / "quickstart"
NUM_EDITIONS = 6  # times that the base reads the almanac
CHAT_WEIGHT = 4  # times that the chat counts when merges are learned, or its openings would be spelled out


def data_files(world: World, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[Mapping[str, object]]]:
    """File name to rows, as the recipe names them."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return {
        "sft.jsonl.gz": list(questions.sft_rows(world)),
        "preferences.jsonl.gz": list(questions.preference_rows(world, count_tokens)),
        "replay.jsonl.gz": [{"text": page} for page in almanac_pages(world)],
        "eval.jsonl.gz": list(questions.eval_rows(world)),
        "heldout_preferences.jsonl.gz": list(questions.heldout_preference_rows(world, count_tokens)),
    }


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Merges learned from the almanac and a sample of chat."""
    return train_tokenizer(almanac_pages(world) + CHAT_WEIGHT * questions.chat_sample(world))


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Gzipped JSON lines; no clock and no file name in the header, so equal rows make equal files."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        packed.write(text.encode())


def main() -> None:
    """Write the embedded files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write (default: the package's)")
    parser.add_argument("--data-only", action="store_true", help="keep the tokenizer and the base model that are there")
    parser.add_argument("--editions", type=int, default=NUM_EDITIONS, help="times that the base reads the almanac")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one thread adds in one order: a second run on this machine gives the same weights
    world = make_world()
    model_folder: Path = arguments.out / "model"
    model_folder.mkdir(parents=True, exist_ok=True)
    if arguments.data_only:
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
    else:
        started = time.monotonic()
        tokenizer = make_tokenizer(world)
        tokenizer.save_pretrained(model_folder)
        model = train_base(tokenizer, [almanac_pages(world, edition) for edition in range(arguments.editions)])
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(model_folder)
        (model_folder / "model.safetensors").chmod(0o644)
        print(f"base trained in {time.monotonic() - started:.0f} s")
    for name, rows in data_files(world, tokenizer).items():
        write_rows(arguments.out / name, rows)
        print(f"{name}: {len(rows)} rows, {(arguments.out / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
