"""Limits on the length of files and functions and on parameters. The project's ceilings (400, 60, 6) are smells to look
at; what is well past them fails here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("configs", "cluster", "actors", "reward_service", "learner", "keel", "examples")
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 75
MAX_PARAMETERS = 8

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_ceilings(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    wrong: list[str] = []
    if text.count("\n") > MAX_FILE_LINES:
        wrong.append(f"{text.count(chr(10))} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            wrong.append(f"{node.name}: {lines} lines, at most {MAX_FUNCTION_LINES}")
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        parameters = [argument for argument in arguments if argument.arg not in ("self", "cls")]
        if len(parameters) > MAX_PARAMETERS:
            wrong.append(f"{node.name}: {len(parameters)} parameters, at most {MAX_PARAMETERS}")
    assert wrong == []
    assert ast.get_docstring(ast.parse(text)) or not text.strip(), "a module says what it is"
