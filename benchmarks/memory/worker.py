"""One configuration in a process of its own: predict, then run, and print both as a line of JSON.

python -m benchmarks.memory.worker RECIPE.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tunesmith.model.machine import Machine
from tunesmith.model.memory import highest_bytes
from tunesmith.pipeline.memory_stages import predict_stages
from tunesmith.pipeline.prepare import prepare_run
from tunesmith.pipeline.run import run_recipe
from tunesmith.recipe.load import parse_recipe


def main(path: Path) -> None:
    """Print the prediction's parts and phases, and the measured peak."""
    loaded = parse_recipe(json.loads(path.read_text()))
    machine = Machine.detect(loaded.recipe.threads)
    (stage,) = predict_stages(loaded.recipe, prepare_run(loaded.recipe), machine)
    assert stage.prediction is not None
    run_recipe(loaded)
    result = {
        "predicted": stage.prediction.peak_bytes,
        "measured": highest_bytes(machine.device),
        "parts": dict(stage.prediction.parts),
        "phases": dict(stage.prediction.phases),
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
