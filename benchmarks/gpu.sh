#!/usr/bin/env bash
# What Keel reaches on this machine's GPU: one command, from a checkout. Needs the GPU set-up of README.md.
#   benchmarks/gpu.sh             the demo, a 0.57 B model through the whole loop, and bare vLLM beside it
#   benchmarks/gpu.sh --tiny --device cpu --out DIR     the same program in small, without a GPU
# Writes benchmarks/results/gpu-CARD.json and prints a table. Without a GPU it says so and ends with status 0.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
exec "$python" -m benchmarks.gpu "$@"
