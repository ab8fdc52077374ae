#!/usr/bin/env bash
# What the GPU machine runs: install the carried wheels, then one of the parts below. README.md says in which order.
# Usage: bash benchmarks/gpu/run.sh smoke|measure|correctness|table [arguments of the part]
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-benchmarks/work/gpu}
state=benchmarks/work/gpu.json
mkdir -p "$out" benchmarks/work
if compgen -G ".whl/*.whl" >/dev/null && [ ! -d /tmp/site ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit
fi
[ -d /tmp/site ] && export PYTHONPATH=/tmp/site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
part=${1:-smoke}
shift || true
case $part in
  smoke)  # a minute or two: versions, the card, and every kind of program at toy shapes on the card
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    python3 - <<'PYTHON'
import importlib
for name in "torch transformers peft accelerate trl datasets bitsandbytes liger_kernel triton flash_attn pydantic tunesmith".split():
    try:
        module = importlib.import_module(name)
        print(name, getattr(module, "__version__", ""))
    except Exception as problem:
        print(name, "MISSING:", type(problem).__name__, str(problem)[:200])
PYTHON
    python3 -m benchmarks.gpu --toy --minutes 3 --out /tmp/smoke --state "$out/smoke.json" "$@" \
      --only dpo-lora-llama-8b memory-nf4-phi-2 t4-nf4-phi-2 head
    for log in /tmp/smoke/logs/*.err; do
      if grep -q Traceback "$log"; then echo "== $log"; tail -n 12 "$log"; fi
    done
    ;;
  measure)  # arguments: --minutes 9, --only KEY...
    python3 -m benchmarks.gpu --state "$state" --out "$out" --logs /tmp/gpu-logs "$@"
    tar -czf "$out/logs.tgz" -C /tmp gpu-logs
    ;;
  correctness)
    python3 -m benchmarks.gpu.correctness "$@"
    ;;
  table)
    python3 -m benchmarks.gpu.table "$state" "$@"
    ;;
  *)
    echo "no part $part: smoke, measure, correctness or table" >&2
    exit 2
    ;;
esac
