#!/bin/sh
# All that wants a GPU, in one go: the tests marked `gpu`, then the table against the reference implementation.
#   benchmarks/gpu.sh PUMA results.json      (PUMA: a clone of JaeyeonKim01/PUMA)
set -eu
reference=${1:?"give a clone of the reference implementation"}
results=${2:?"name the JSON file for the results"}
cd "$(dirname "$0")/.."
python -m pytest -m gpu
python benchmarks/against_reference.py --reference "$reference" --device cuda --batch 32 --steps 20 --json "$results" \
  --only sudoku-step tinygsm-step decode-own
python -m unmask bench step tinygsm/puma train.batch_size=32 --json
