#!/usr/bin/env bash
# Put the wheels that the GPU machine lacks into .whl/ at the repository's root: some 51 MiB, Python 3.12, x86-64.
# Run it where pip reaches a registry; then carry `.whl` with every call. Arguments: more wheels, NAME==VERSION.
set -euo pipefail
cd "$(dirname "$0")/../.."
grep -qx /.whl/ .git/info/exclude || echo /.whl/ >>.git/info/exclude
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
rm -rf .whl
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" -d .whl trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 peft==0.21.2 \
  bitsandbytes==0.50.2 liger-kernel==0.8.5 cut-cross-entropy==25.1.1 pydantic==2.14.3 pydantic-core==2.50.4 \
  annotated-types==0.7.0 typing-inspection==0.4.5 typing-extensions==4.16.0 ruamel.yaml==0.19.1 rensa==0.5.0 \
  py3langid==0.4.0 "$@"
du -sm .whl
