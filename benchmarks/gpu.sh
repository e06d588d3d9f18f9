#!/bin/sh
# All that wants a GPU, within a number of minutes, and without a network: see `benchmarks/gpu.sh --help`.
# Packages that the machine lacks (benchmarks/gpu_wheels.txt) are taken from the folder $WHEELS, .wheels unless set.
set -eu
GPU_STARTED=$(date +%s)  # installing and importing count too
export GPU_STARTED
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.wheels}
if [ -d "$wheels" ]; then
  site=$(mktemp -d)
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" benchmarks/gpu.py "$@"
