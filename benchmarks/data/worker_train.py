"""A whole run on a large file: prepared, then trained for a few steps from the memory-mapped trees; peak memory.

In: a file of rows. Out: one JSON file. Must not know: TRL.

The model is the quickstart's, so that what is measured is the data's memory, and its small vocabulary makes many tokens
of a text. What a process may map for itself is bounded (RLIMIT_DATA, which counts what is reserved as well; pages of
mapped files do not count): a run that read its rows into memory would end.
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
        self.preparing_gib = 0.0  # while there are workers
        self.rss_gib = 0.0

    def run(self) -> None:
        own = psutil.Process()
        while True:
            alone = rss = 0
            workers = own.children(recursive=True)
            for process in (own, *workers):
                try:
                    full = process.memory_full_info()
                except psutil.Error:
                    continue
                alone += full.uss
                rss = max(rss, full.rss)
            self.gib, self.rss_gib = max(self.gib, alone / 2**30), max(self.rss_gib, rss / 2**30)
            self.preparing_gib = max(self.preparing_gib, alone / 2**30 if workers else 0)
            time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--limit-gib", type=float, default=2.5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.rows.parent) as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        import tunesmith

        stage = {"name": "sft", "method": "sft", "train": [{"path": str(args.rows)}], "max_steps": 3, "batch_size": 8}
        recipe = {
            "name": "large",
            "model": {"path": "embedded:quickstart/model"},
            "stages": [stage | {"max_length": 4096}],
            "runs_folder": str(folder / "runs"),
        }
        limit = int(args.limit_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        peak = Peak()
        peak.start()
        start = time.perf_counter()
        run = tunesmith.run(recipe)
        seconds = time.perf_counter() - start
        entry = next(path for path in (folder / "cache/tunesmith/prepared").iterdir() if path.is_dir())
        counts = json.loads((run / "manifest.json").read_text())["rows"]["sft"]
        result = {
            "bytes": args.rows.stat().st_size,
            "store_bytes": sum(path.stat().st_size for path in entry.rglob("*") if path.is_file()),
            "trained_rows": counts["train"],
            "seconds": seconds,
            "steps": len((run / "stages/sft/metrics.jsonl").read_text().splitlines()),
            "peak_private_gib": peak.gib,
            "preparing_gib": peak.preparing_gib,
            "peak_rss_gib": peak.rss_gib,
            "limit_gib": args.limit_gib,
        }
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
