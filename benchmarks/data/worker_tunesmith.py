"""Our preparation of a file, timed: from the file to trees on disk, and again from the cache.

In: a method, a file of rows, a tokenizer with its template. Out: one JSON file. Must not know: TRL.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from tunesmith.data.prepare import prepare_stage
from tunesmith.data.render import Renderer
from tunesmith.data.store import sizes_of
from tunesmith.data.template import ChatTemplate
from tunesmith.recipe.models import DpoStage, SftStage


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=("sft", "dpo"))
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--template", type=Path)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    values = {"name": args.method, "method": args.method, "train": [{"path": str(args.rows)}], "max_length": 1 << 20}
    stage = (SftStage if args.method == "sft" else DpoStage).model_validate(values)
    template = ChatTemplate(name=args.template.name, source=args.template.read_text())
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            renderer = Renderer(tokenizer, template, stage.max_length)
            start = time.perf_counter()
            prepared = prepare_stage(stage, renderer, workers=args.processes, cache_folder=Path(folder))
            seconds.append(time.perf_counter() - start)
        sizes = sizes_of(prepared.train)
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        result = {
            "rows": len(prepared.ledger),
            "trees": len(prepared.train),
            "seconds": seconds[0],
            "second_start": seconds[1],
            "peak_rss_gib": own,
            "worker_rss_gib": workers,
            "first_row_tokens": int(sizes.num_tokens[0]),
            "tokens": int(sizes.num_tokens.sum()),
        }
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
