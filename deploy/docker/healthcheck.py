#!/usr/bin/env python3
"""Whether the processes of a run make progress: asks /healthz of each that its driver lists. Standard library only.

keel-healthcheck --runs /keel/runs                                      the runs under a folder, or one run's folder
keel-healthcheck --runs /keel/runs/ppo-7b --instance reward-1003.0      one process of a run

Exit code 1 when a process answers that it has stalled, or, asked for by --instance, does not answer; 0 otherwise. A
process that is not listed (yet) is no failure: the offline stages serve no metrics.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

TIMEOUT_S = 5.0
NOT_OURS = frozenset({"ray"})
"""Roles that are listed for Prometheus and have no /healthz."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="a folder of runs, or one run's")
    parser.add_argument("--instance", help="ask this process only")
    options = parser.parse_args()
    problems = []
    for address, instance in targets(options.runs):
        if options.instance in (None, instance):
            problem = ask(address, must_answer=options.instance is not None)
            if problem:
                problems.append(f"{instance} at {address}: {problem}")
    print("\n".join(problems) or "ok")
    return 1 if problems else 0


def targets(runs: Path) -> list[tuple[str, str]]:
    """(address, instance) of every listed process of Keel's."""
    found = []
    for path in [*runs.glob("prometheus_targets.json"), *runs.glob("*/prometheus_targets.json")]:
        try:
            groups = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # Replaced whole by its writer; a broken one is a network file system's passing fault.
        for group in groups:
            if group["labels"].get("role") not in NOT_OURS:
                found.extend((address, group["labels"].get("instance", "")) for address in group["targets"])
    return found


def ask(address: str, *, must_answer: bool) -> str:
    """What is wrong with the process, or nothing. Who does not answer may be on the way out, or a finished run's."""
    try:
        with urllib.request.urlopen(f"http://{address}/healthz", timeout=TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        return error.read().decode(errors="replace").strip() or f"HTTP {error.code}"
    except OSError as error:
        return f"no answer: {error}" if must_answer else ""


if __name__ == "__main__":
    sys.exit(main())
