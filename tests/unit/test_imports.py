"""Who may import whom: configs ← cluster ← {actors, reward_service, learner} ← keel, heavy libraries behind one file
each, and a command line that starts fast."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("configs", "cluster", "actors", "reward_service", "learner", "keel", "examples")
ALLOWED: dict[str, frozenset[str]] = {
    "configs": frozenset(),
    "cluster": frozenset({"configs"}),
    "actors": frozenset({"configs", "cluster"}),
    "reward_service": frozenset({"configs", "cluster"}),
    "learner": frozenset({"configs", "cluster"}),
    "keel": frozenset({"configs", "cluster", "actors", "reward_service", "learner"}),
    # Worlds are named in a configuration, so nobody imports them; they see no more than records, errors and files.
    "examples": frozenset({"configs", "cluster"}),
}
HEAVY: dict[str, frozenset[str]] = {
    "vllm": frozenset(
        {
            "actors/engine_vllm.py",
            "actors/vllm_worker.py",
            "actors/engine_core_thread.py",
            "cluster/weights_nccl.py",  # both ends of vLLM's own NCCL weight transfer; imported inside functions
        }
    ),
    "redis": frozenset({"cluster/redis_client.py", "cluster/streams_redis.py"}),
    "trl": frozenset({"learner/sft.py", "learner/dpo.py", "reward_service/rm/fit.py"}),
    "fastapi": frozenset({"reward_service/review/page.py"}),
    "peft": frozenset({"learner/lora.py"}),
    "matplotlib": frozenset(
        {"cluster/charts.py", "keel/plots.py", "keel/preferences/plots.py", "reward_service/card/plots.py"}
    ),
    "sklearn": frozenset({"reward_service/audit/leakage.py", "reward_service/audit/rebalance.py"}),
}
"""Library → the files that may import it."""
CONFIGS_MAY_IMPORT = frozenset({"pydantic", "yaml"})
_DECISIONS = (
    "batcher", "preferences", "aggregate", "audit/annotations", "audit/agreement", "audit/annotator_bias",
    "audit/rebalance", "audit/cues", "audit/audit", "card/probes", "card/measure", "rm/triggers",
)  # fmt: skip
DECISION_MODULES = tuple(f"reward_service/{name}.py" for name in _DECISIONS)
"""Pure decisions: no ray, no redis, no torch."""


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also inside functions and type-checking blocks."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.lineno, node.module or ""


def top(module: str) -> str:
    return module.partition(".")[0]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_between_packages(package: str) -> None:
    allowed = ALLOWED[package] | {package}
    wrong = [
        f"{relative(path)}:{line} imports {module}"
        for path in sources(package)
        for line, module in imports(path)
        if top(module) in (*PACKAGES, "tests") and top(module) not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_libraries_stand_behind_their_files(library: str) -> None:
    wrong = [
        f"{relative(path)}:{line} imports {module}"
        for package in PACKAGES
        for path in sources(package)
        for line, module in imports(path)
        if top(module) == library and relative(path) not in HEAVY[library]
    ]
    assert wrong == []


def test_configs_are_light() -> None:
    wrong = [
        f"{relative(path)}:{line} imports {module}"
        for path in sources("configs")
        for line, module in imports(path)
        if top(module) not in CONFIGS_MAY_IMPORT | {"configs"} | sys.stdlib_module_names
    ]
    assert wrong == []


def test_algorithms_import_torch_alone() -> None:
    wrong = [
        f"{relative(path)}:{line} imports {module}"
        for path in sources("learner/algo")
        for line, module in imports(path)
        if top(module) not in sys.stdlib_module_names | {"torch"} and not module.startswith("learner.algo")
    ]
    assert wrong == []


@pytest.mark.parametrize("name", DECISION_MODULES)
def test_decisions_need_no_queue_and_no_model(name: str) -> None:
    modules = {top(module) for _, module in imports(ROOT / name)}
    assert modules & {"ray", "redis", "torch", "transformers", "trl"} == set()


def test_nothing_is_pickled_and_no_checkpoint_is_unpickled() -> None:
    wrong = [
        f"{relative(path)}:{line} imports {module}"
        for package in PACKAGES
        for path in sources(package)
        for line, module in imports(path)
        if top(module) in ("pickle", "cloudpickle", "dill", "shelve", "marshal")
    ]
    assert wrong == []


CLI = ROOT / "keel" / "cli.py"
IMPORT_CLI = """
import sys, time
before = time.process_time()
import keel.cli
print(time.process_time() - before)
print(sorted({"torch", "ray", "vllm", "transformers", "trl", "redis", "matplotlib"} & set(sys.modules)))
"""


@pytest.mark.skipif(not CLI.exists(), reason="no command line yet")
def test_the_command_line_starts_fast_and_light() -> None:
    """CPU seconds, best of three, so that a busy machine does not fail it."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", IMPORT_CLI],
            cwd=ROOT,
            env=dict(os.environ),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for _ in range(3)
    ]
    assert {lines[1] for lines in runs} == {"[]"}
    assert min(float(lines[0]) for lines in runs) < 0.3
