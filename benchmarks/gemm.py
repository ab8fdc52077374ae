"""The machine's own float32 matrix-product rate, in a process of its own, right before the measurements it judges.

In: threads. Out: GFLOP/s of products at the model's shapes and of a large square one, as one line of JSON.
Must not know: who is measured.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch.nn.functional import linear

SHAPES = {
    "1024x512 @ 512x1408": (1024, 512, 1408),
    "1024x1408 @ 1408x512": (1024, 1408, 512),
    "2048x2048 @ 2048x2048": (2048, 2048, 2048),
}
SECONDS = 1.0
"""Time a shape: long enough that the best of many repeats is the machine's, not the neighbours'."""


def gflops(rows: int, inner: int, columns: int) -> float:
    """The best of as many products as fit into SECONDS."""
    left, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    linear(left, weight)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        linear(left, weight)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    print(json.dumps({name: gflops(*shape) for name, shape in SHAPES.items()}))


if __name__ == "__main__":
    main()
