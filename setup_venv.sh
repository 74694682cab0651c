#!/usr/bin/env bash
# Makes a virtual environment from the pinned lock. Used by `make demo`, `make test` and CI; safe to run again.
set -euo pipefail
venv=${1:-.venv}
python=${PYTHON:-python3}
cd "$(dirname "$0")"

if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))'; then
  echo "setup: Keel needs Python 3.11 or later; got: $("$python" --version 2>&1); do: PYTHON=python3.11 make demo" >&2
  exit 1
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "setup: installing the pinned packages into $venv (about 3.2 GB, 2 to 4 minutes)"
# torch's CPU build carries the local version +cpu. Where pip has no index that serves it, name one in
# PIP_EXTRA_INDEX_URL or a folder of wheels in PIP_FIND_LINKS (README, "Two commands").
if ! "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r requirements-cpu.lock; then
  echo "setup: an install failed; if it was torch==…+cpu: set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index" >&2
  exit 1
fi
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
touch "$venv/.ready"
