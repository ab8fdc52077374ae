#!/usr/bin/env bash
# make bench: install TRL in a virtual environment of its own, once, then measure it beside Tunesmith.
# MODULE is the driver (make bench-data: benchmarks.data.compare; the losses side by side: benchmarks.methods.agree_trl).
# Arguments go to it: make bench ARGS="--rounds 1 --steps 1 --pairs-per-step 4"
set -euo pipefail
cd "$(dirname "$0")/.."

own=.venv/bin/python
venv=benchmarks/.venv-bench
pins=benchmarks/constraints-trl.txt
stamp=$venv/.installed

# The stamp holds the pins and is written last: interrupted or outdated set-ups are done again, finished ones are kept.
if ! cmp -s "$pins" "$stamp"; then
  echo "Installing TRL into $venv; the first time this takes some minutes."
  rm -f "$stamp"
  [ -x "$venv/bin/python" ] || "$own" -m venv "$venv"
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint "$pins" \
    "trl==1.16.*" "torch==2.13.0" transformers peft
  cp "$pins" "$stamp"
fi

exec "$own" -m "${MODULE:-benchmarks.compare_trl}" "$@"
