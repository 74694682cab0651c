"""A configuration from a preset or file and `--set` overrides, checked whole; and back to YAML.

Every problem is reported at once, each with its dotted path, what was got, and the nearest valid name for an unknown
one. Nothing heavy is imported: this module stands on the command line's path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.checks import cross_check
from configs.errors import ConfigError
from configs.paths import (
    default_tag,
    follow,
    is_mapping,
    keys_of,
    kinds_with,
    models_at,
    narrowed,
    nearest,
    nearest_path,
    tag_of,
)
from configs.run import RunConfig
from configs.yaml_text import dump_yaml, parse_yaml

PRESETS_DIR = Path(__file__).parent


def preset_names() -> list[str]:
    """The presets that ship with Keel, by bare name."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def load_config(name_or_path: str | Path, *, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of preset `name_or_path` (a bare name) or of the YAML file there, with `a.b=c` overrides.

    Raises ConfigError: no such file, not YAML, an unknown or repeated key, values that do not fit, contradictions
    between sections.
    """
    path = _locate(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the configuration {path}", got=str(error), do="give a UTF-8 YAML file"
        ) from error
    raw = parse_yaml(text, where=str(path))
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} holds no sections",
            got=f"a YAML {_kind(raw)}",
            do="write `key: value` lines; see configs/demo.yaml",
        )
    for override in overrides:
        _override(raw, override)
    return parse_config(raw, where=str(path))


def parse_config(raw: Mapping[str, Any], *, where: str) -> RunConfig:
    """A plain mapping → a checked configuration. `where` names its origin in errors. Raises ConfigError."""
    try:
        config = RunConfig.model_validate(dict(raw))
    except ValidationError as error:
        problems = [_problem(dict(detail)) for detail in error.errors(include_url=False)]
        raise _error(
            where, problems, do="correct these keys; configs/run.py lists every key with its meaning"
        ) from error
    cross_check(config, where=where)
    return config


def dump_config(config: RunConfig) -> str:
    """YAML text with every key, defaults included; `load_config` of it gives an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))


# ---------------------------------------------------------------- where the file is


def _locate(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    if name in preset_names():
        return PRESETS_DIR / f"{name}.yaml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(
            f"{path} is no configuration",
            got="a directory",
            do=f"give a YAML file, or a preset: {', '.join(preset_names())}",
        )
    stem = nearest(path.stem, preset_names())
    hint = f"did you mean {stem}? " if stem else ""
    raise ConfigError(
        f"no configuration {name}",
        got="neither a preset nor a file",
        do=f"{hint}presets: {', '.join(preset_names())}; or give the path of a YAML file",
    )


# ---------------------------------------------------------------- --set


def _override(raw: dict[str, Any], override: str) -> None:
    """Put `a.b=value` into `raw`. Raises ConfigError for a malformed override or a path that no section has."""
    path, equals, text = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ConfigError(
            "--set takes a dotted path, = and a value",
            got=repr(override),
            do="for example: --set learner.kl.target_nats_per_sequence=6",
        )
    value = parse_yaml(text, where=f"--set {override}")
    node: Any = RunConfig
    here = raw
    for depth, key in enumerate(keys):
        models = narrowed(models_at(node), here.get("kind"))
        valid = keys_of(models_at(node))
        if key not in valid and not is_mapping(node):
            _refuse_key(key, prefix=".".join(keys[:depth]), valid=list(keys_of(models) or valid))
        if depth == len(keys) - 1:
            here[key] = value
            return
        inner = valid.get(key, str)
        if not models_at(inner) and not is_mapping(inner):
            _refuse_key(keys[depth + 1], prefix=".".join(keys[: depth + 1]), valid=[])
        child = here.get(key)
        if child is None:
            # A section that the file left at its default keeps the default's kind: only the named key changes.
            tag = default_tag(models, key)
            child = here[key] = {} if tag is None else {"kind": tag}
        if not isinstance(child, dict):
            raise ConfigError(
                f"--set {override}: {'.'.join(keys[: depth + 1])} is no section",
                got=f"{child!r} in the file",
                do="set the section as a whole, for example --set 'learner.kl={kind: fixed, beta: 0.1}'",
            )
        # A copy: with YAML aliases, one mapping may stand in two places.
        here[key] = dict(child)
        here, node = here[key], inner


def _refuse_key(key: str, *, prefix: str, valid: list[str]) -> None:
    if not valid:
        raise ConfigError(f"--set: {prefix} is a plain value", got=f"{prefix}.{key}", do=f"set {prefix} itself")
    match = nearest_path(RunConfig, key, valid)
    full = f"{prefix}.{match}" if prefix and match in valid else match
    hint = f"nearest valid: {full}" if match else f"valid here: {', '.join(valid)}"
    raise ConfigError("--set: unknown key", got=".".join(filter(None, (prefix, key))), do=hint)


# ---------------------------------------------------------------- problems in words


def _problem(detail: dict[str, Any]) -> str:
    """One pydantic error as `path: what is wrong`."""
    loc: tuple[str | int, ...] = detail["loc"]
    kind: str = detail["type"]
    context: dict[str, Any] = detail.get("ctx", {})
    path, models = follow(RunConfig, loc)
    if kind == "extra_forbidden":
        return _unknown_key(loc, detail["input"])
    if kind == "missing":
        return f"{path}: missing, and has no default"
    if kind == "union_tag_not_found":
        return f"{path}: `kind` is missing; one of {', '.join(str(tag_of(model)) for model in models)}"
    if kind == "union_tag_invalid":
        tags = [str(tag_of(model)) for model in models]
        return f"{path}.kind: got {context['tag']!r}; one of {', '.join(tags)}{_suggest(str(context['tag']), tags)}"
    if kind == "literal_error":
        choices = context["expected"]
        names = [part.strip("' ") for part in choices.replace(" or ", ",").split(",")]
        return f"{path}: got {detail['input']!r}; one of {choices}{_suggest(str(detail['input']), names)}"
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    return f"{path}: got {_short(detail['input'])}; {message}"


def _unknown_key(loc: tuple[str | int, ...], value: object) -> str:
    parent, models = follow(RunConfig, loc[:-1])
    key = str(loc[-1])
    valid = list(keys_of(models))
    tag = tag_of(models[0]) if len(models) == 1 else None
    siblings = kinds_with(RunConfig, parent, key)
    if tag and siblings:
        return (
            f"{parent}.{key}: unknown key of kind {tag} (value {_short(value)}); it belongs to kind "
            f"{' and '.join(siblings)}: give the section as a whole, --set '{parent}={{kind: {tag}, ...}}'"
        )
    match = nearest_path(RunConfig, key, valid)
    full = f"{parent}.{match}" if parent and match in valid else match
    path = ".".join(filter(None, (parent, key)))
    of_kind = f" of kind {tag}" if tag else ""
    hint = f"nearest valid: {full}" if match else f"valid here{of_kind}: {', '.join(valid)}"
    return f"{path}: unknown key{of_kind} (value {_short(value)}); {hint}"


def _suggest(got: str, valid: list[str]) -> str:
    match = nearest(got, valid)
    return f"; nearest: {match}" if match else ""


def _short(value: object) -> str:
    text = f"{value!r} ({type(value).__name__})"
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(raw: object) -> str:
    return (
        "file with nothing in it" if raw is None else {"list": "list", "str": "text"}.get(type(raw).__name__, "value")
    )


def _error(where: str, problems: Sequence[str], *, do: str) -> ConfigError:
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return ConfigError(
        f"{where}: {count}", got="\n    - " + "\n    - ".join(problems) if len(problems) > 1 else problems[0], do=do
    )
