"""Does `tunesmith calibrate` find what a full grid finds? On the quickstart world, stage `dpo`.

    PYTHONPATH=src:. python -m benchmarks.calibrate.validate [--work FOLDER] [--columns 0,1,2,-1,-2]

The calibration's own probes, then every point of the grid at the stage's full length; both judged by the same rule.
Each probe is written down when it is done, so the command goes on where it was broken off. Results:
`benchmarks/results/calibrate.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from tunesmith.pipeline.calibrate import bench_of, calibrate
from tunesmith.pipeline.calibrate_bench import FULL_LIMITS, Bench
from tunesmith.pipeline.calibrate_search import REACH, Place, Probe, choose, excess
from tunesmith.recipe.load import LoadedRecipe, load_named
from tunesmith.runs.inventory import read_object

RESULT = Path("benchmarks/results/calibrate.json")


def short_probes(loaded: LoadedRecipe, path: Path) -> list[Probe]:
    """The calibration's own probes."""
    if not path.is_file():
        found = calibrate(loaded, stage="dpo", tell=print)
        path.write_text((found.folder / "calibrate.json").read_text())
    probes = read_object(path)["probes"]
    assert isinstance(probes, list)
    return [_probe(each) for each in probes]


def full_probes(loaded: LoadedRecipe, path: Path, columns: list[int]) -> list[Probe]:
    """The grid at full length, a column of betas for each learning rate."""
    done = [_probe(json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []
    known = {probe.place for probe in done}
    places: list[Place] = [(rate, beta) for rate in columns for beta in range(-REACH, REACH + 1)]
    bench: Bench | None = None
    for place in places:
        if place in known:
            continue
        bench = bench or bench_of(loaded, stage="dpo", steps=10**9, tell=print)
        done.append(bench.probe(place))
        with path.open("a") as file:
            file.write(json.dumps(asdict(done[-1])) + "\n")
    return done


def _probe(values: object) -> Probe:
    assert isinstance(values, Mapping)
    known = {each.name: values[each.name] for each in fields(Probe)}
    return Probe(**{**known, "place": tuple(known["place"])})


def compared(short: list[Probe], full: list[Probe], share: float) -> dict[str, object]:
    """The recommended pair beside the grid's own choice, by figures of the full stage. share: of a probe's steps."""
    limits = type(FULL_LIMITS)(FULL_LIMITS.kl * share, FULL_LIMITS.fall * share)
    asked, best = choose(short, limits).probe, choose(full, FULL_LIMITS).probe
    at = {probe.place: probe for probe in full}
    within = [probe for probe in full if not list(excess(probe, FULL_LIMITS))]
    highest = max(probe.accuracy or 0.0 for probe in within)
    there = at.get(asked.place)
    return {
        "recommended": asdict(asked),
        "recommended, whole stage": None if there is None else asdict(there),
        "grid's choice": asdict(best),
        "accuracy below the grid's highest within the limits": None
        if there is None
        else highest - (there.accuracy or 0.0),
        "recommended keeps the limits": None if there is None else not list(excess(there, FULL_LIMITS)),
        "half-decades from the grid's choice": [best.place[axis] - asked.place[axis] for axis in (0, 1)],
        "points of the grid": len(full),
        "seconds": {"calibration": sum(p.seconds for p in short), "grid": sum(p.seconds for p in full)},
        "steps relative to the grid": len(short) * share / len(full),
        "grid": [asdict(probe) for probe in full],
        "probes": [asdict(probe) for probe in short],
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/tunesmith-calibrate"))
    parser.add_argument("--columns", default="0,1,2,-1,-2", help="learning rates, in half-decades from the recipe's")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    loaded = load_named("quickstart", [f"runs_folder={given.work / 'runs'}", "threads=1"])
    short = short_probes(loaded, given.work / "short.json")
    full = full_probes(loaded, given.work / "full.jsonl", [int(each) for each in given.columns.split(",")])
    steps = read_object(given.work / "short.json")
    num, whole = steps["num_steps"], steps["stage_steps"]
    assert isinstance(num, int)
    assert isinstance(whole, int)
    found = compared(short, full, num / whole)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name not in ("grid", "probes")}, indent=1))


if __name__ == "__main__":
    main()
