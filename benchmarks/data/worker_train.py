"""A whole run on a large file: prepared, then trained for a few steps from the memory-mapped trees; peak memory.

In: a file of rows, a tokenizer with its template. Out: one JSON file. Must not know: TRL.

The model is tiny, so that what is measured is the data's memory; the private memory of the process is bounded
(RLIMIT_DATA), which file-backed pages do not count towards: a run that read its rows into memory would end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import threading
import time
from pathlib import Path

import psutil


class Peak(threading.Thread):
    """Watches this process and its workers: the largest sum of what each holds alone (USS), in GiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gib = 0.0
        self.rss_gib = 0.0

    def run(self) -> None:
        own = psutil.Process()
        while True:
            alone = rss = 0
            for process in (own, *own.children(recursive=True)):
                try:
                    full = process.memory_full_info()
                except psutil.Error:
                    continue
                alone += full.uss
                rss = max(rss, full.rss)
            self.gib, self.rss_gib = max(self.gib, alone / 2**30), max(self.rss_gib, rss / 2**30)
            time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--template", type=Path)
    parser.add_argument("--limit-gib", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.rows.parent) as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        import tunesmith

        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        stage = {"name": "sft", "method": "sft", "train": [{"path": str(args.rows)}], "max_steps": 3, "batch_size": 8}
        recipe = {
            "name": "large",
            "model": {"path": str(folder / "model"), "chat_template": str(args.template)},
            "stages": [stage],
            "runs_folder": str(folder / "runs"),
        }
        soft = int(args.limit_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, soft))
        peak = Peak()
        peak.start()
        start = time.perf_counter()
        run = tunesmith.run(recipe)
        seconds = time.perf_counter() - start
        entry = next(path for path in (folder / "cache/tunesmith/prepared").iterdir() if path.is_dir())
        store = sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
        timings = (run / "stages/sft/metrics.jsonl").read_text().splitlines()
        result = {
            "bytes": args.rows.stat().st_size,
            "store_bytes": store,
            "seconds": seconds,
            "steps": len(timings),
            "peak_uss_gib": peak.gib,
            "peak_rss_gib": peak.rss_gib,
            "limit_gib": args.limit_gib,
        }
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
