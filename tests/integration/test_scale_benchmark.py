"""The scaling benchmark's harness, in small: whether it measures, not how much. Its figures: docs/scaling.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROLES = {"learner", "queue server", "reward", "actor"}


def test_a_quick_sweep_measures_every_role(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    command = [sys.executable, "-m", "benchmarks.scale", "--quick", "--out", str(out)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    points = json.loads(out.read_text())["points"]
    assert [point["actors"] for point in points] == [1, 2, 4, 4]
    for point in points:
        assert 0.0 < point["trained_per_s"] < 2 * point["offered_per_s"]
        assert set(point["cpu_ms_per_sample"]) == ROLES
        assert all(cost > 0.0 for cost in point["cpu_ms_per_sample"].values())
    free, saturated = sorted(points[2:], key=lambda point: -point["offered_per_s"])
    assert saturated["trained_per_s"] < free["trained_per_s"], "a learner of half the rate holds its actors back"
    assert "| actors |" in done.stdout
