"""YAML in and out, with the three traps of YAML 1.1 that bite in a configuration closed: `1e-3` is a number, a repeated
key is an error, and every value that is written reads back as what it was.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from configs.errors import ConfigError

_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
"""YAML 1.2's floats with an exponent. YAML 1.1 wants a dot and a sign (1.0e-3) and takes 1e-3 for text."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys, where the library lets the last one win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in first_line and key.tag != "tag:yaml.org,2002:merge":
                problem = f"key {key.value!r} stands twice, first on line {first_line[key.value]}"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            first_line[str(key.value)] = line
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, *, where: str) -> Any:
    """YAML text → plain values. Raises ConfigError with the line, naming `where` the text is from."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{where}{place}: not valid YAML",
            got=str(error.problem or error.context),
            do="indent with spaces, write `key: value`, quote text that holds : or #",
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML", got=str(error), do="write plain `key: value` lines") from error


def dump_yaml(values: dict[str, Any]) -> str:
    """Plain values → YAML text, keys in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text
