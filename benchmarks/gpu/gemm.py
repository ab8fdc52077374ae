"""The card's own dense matrix-product rate, in a process of its own, in the same call as the measurements it judges.

In: a type. Out: TFLOP/s of products of random matrices, as one line of JSON; the best is what utilization is a share
of. Must not know: who is measured.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch
from torch.nn.functional import linear

SHAPES = ((8192, 8192, 8192), (16_384, 4096, 14_336), (8192, 4096, 4096), (8192, 14_336, 4096), (16_384, 8192, 8192))
SECONDS = 0.7
"""Time a shape."""


def tflops(rows: int, inner: int, columns: int, *, device: torch.device, dtype: torch.dtype) -> float:
    """Median of batches of ten products, on random numbers: zeros run faster."""
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    weight = torch.randn(columns, inner, device=device, dtype=dtype)

    def batch() -> float:
        start = time.perf_counter()
        for _ in range(10):
            linear(left, weight)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / 10

    batch()
    seconds, begin = [], time.perf_counter()
    while time.perf_counter() - begin < SECONDS or len(seconds) < 3:
        seconds.append(batch())
    return 2 * rows * inner * columns / median(seconds) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    toy = parser.parse_args().toy
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = ((128, 128, 128),) if toy else SHAPES
    rates = {f"{m}x{k}x{n}": tflops(m, k, n, device=device, dtype=dtype) for m, k, n in shapes}
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    total = torch.cuda.get_device_properties(0).total_memory / 2**30 if device.type == "cuda" else 0.0
    print(json.dumps({"tflops": rates, "device": name, "memory_gib": total, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
