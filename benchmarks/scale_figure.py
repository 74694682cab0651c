"""The figure of docs/scaling.md, and the limits behind its extrapolation, from what benchmarks/scale.py wrote.

`python -m benchmarks.scale_figure benchmarks/results/scale.json docs/scaling.png` draws it and prints them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Point = dict[str, Any]


def unlimited(points: Sequence[Point]) -> list[Point]:
    """Those where the engines, not the learner, set the rate: the fastest of each number of actors."""
    best: dict[int, Point] = {}
    for point in points:
        if point["offered_per_s"] >= best.get(point["actors"], point)["offered_per_s"]:
            best[point["actors"]] = point
    return [best[actors] for actors in sorted(best)]


def limits(points: Sequence[Point]) -> dict[str, float]:
    """Samples/s that one core of each role can take, from its CPU a sample at the highest rate. What a role costs at
    rest is in it, so the real limit is higher."""
    top = max(points, key=lambda point: float(point["trained_per_s"]))
    return {role: 1e3 / ms for role, ms in top["cpu_ms_per_sample"].items()}


def draw(points: Sequence[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    free = unlimited(points)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    actors = [point["actors"] for point in free]
    left.loglog(actors, [point["offered_per_s"] for point in free], "--", color="0.6", label="linear")
    left.loglog(actors, [point["trained_per_s"] for point in free], "o-", label="trained")
    held = [point for point in points if point not in free]
    left.loglog([p["actors"] for p in held], [p["trained_per_s"] for p in held], "s", label="slower learner")
    left.set(xlabel="rollout actors", ylabel="samples/s")
    left.legend()
    for role in free[0]["cpu_ms_per_sample"]:
        right.loglog(actors, [point["cpu_ms_per_sample"][role] for point in free], "o-", label=role)
    right.set(xlabel="rollout actors", ylabel="CPU ms a sample")
    right.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    points = json.loads(source.read_text())["points"]
    draw(points, target)
    for role, samples_per_s in limits(points).items():
        print(f"{role:14} one core takes {samples_per_s:6.0f} samples/s or more")


if __name__ == "__main__":
    main()
