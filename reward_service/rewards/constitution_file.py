"""The constitution as people write it: its form, and what is wrong with a file, each problem with its rule and line.

    rules:
      - name: flattery
        when: {phrases: [you are amazing, i love you]}
        then: {penalise: {std: 1.0}}

Every problem is reported at once. Pure: nothing is compiled or imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import Field, PositiveInt, StringConstraints, ValidationError, field_validator, model_validator

from cluster.errors import ConfigError
from configs.paths import follow, keys_of, nearest
from configs.section import Section

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Loc = tuple[str | int, ...]
CONSTITUTION_FILE: Final = "constitution.yaml"
"""A run's own copy, in its directory."""
_ONE_EFFECT = "say one of flag, penalise: {std: 1.0}, override: {std: -3.0}"
_DO = "correct these lines; docs/rewards.md describes every key"


class When(Section):
    """The rule is hit where any of these holds."""

    regex: str | None = None
    """Found anywhere in the text. Python's syntax."""
    phrases: tuple[Text, ...] | None = None
    """Any of them stands in the text as whole words, however they are spaced."""
    ignore_case: bool | None = None
    """Left out: yes for phrases, no for a regex."""
    max_words: PositiveInt | None = None
    """More words than this."""
    min_words: PositiveInt | None = None
    """Fewer words than this."""
    max_tokens: PositiveInt | None = None
    """More tokens than this in the answer, its end-of-sequence token counted."""
    function: str | None = None
    """"package.module:function": (prompt, answer) → bool, or a text that says what was found."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        named = self.model_fields_set - {"ignore_case"}
        if not named or any(getattr(self, name) is None for name in named):
            raise ValueError("name at least one of regex, phrases, max_words, min_words, max_tokens, function")
        if self.phrases is not None and not self.phrases:
            raise ValueError("phrases is empty")
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise ValueError("min_words is more than max_words, so that every text would hit")
        if self.ignore_case is not None and self.regex is None and self.phrases is None:
            raise ValueError("ignore_case goes with regex or phrases")
        return self


class Penalty(Section):
    """Taken off the reward."""

    std: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Override(Section):
    """Put in the reward's place."""

    std: Annotated[float, Field(allow_inf_nan=False)]


class Then(Section):
    """What a hit does; beside it every hit is recorded and may be shown to people. `std`: standard deviations of the
    reward model's scores on its calibration set, for an override counted from their mean."""

    flag: bool = False
    penalise: Penalty | None = None
    override: Override | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "flag":
            raise ValueError(_ONE_EFFECT)
        return {"flag": True} if value == "flag" else value

    @model_validator(mode="after")
    def _one(self) -> Self:
        if [self.flag, self.penalise is not None, self.override is not None].count(True) != 1:
            raise ValueError(_ONE_EFFECT)
        return self


class RuleText(Section):
    """One rule as it stands in the file."""

    name: Text
    when: When
    on: Literal["answer", "prompt"] = "answer"
    """Where regex, phrases and words are looked for. A function always gets both."""
    then: Then

    @model_validator(mode="after")
    def _tokens_of_the_answer(self) -> Self:
        if self.on == "prompt" and self.when.max_tokens is not None:
            raise ValueError("max_tokens counts the answer's tokens; it does not go with `on: prompt`")
        return self


class RuleFile(Section):
    """The whole file."""

    rules: tuple[RuleText, ...]

    @field_validator("rules")
    @classmethod
    def _some(cls, rules: tuple[RuleText, ...]) -> tuple[RuleText, ...]:
        if not rules:
            raise ValueError("no rules")
        return rules


class ReadRules:
    """A file's rules, and where each thing in it stands."""

    def __init__(self, path: Path, rules: tuple[RuleText, ...], root: yaml.Node) -> None:
        self.path = path
        self.rules = rules
        self._root = root

    def place(self, index: int, *keys: str) -> str:
        """'rule flattery (line 4)' for messages; the line is that of the key."""
        return f"rule {self.rules[index].name} (line {_line(self._root, ('rules', index, *keys))})"


def read_rules(path: Path) -> ReadRules:
    """Raises ConfigError naming every rule and line that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the constitution {path}", got=str(error), do="give a UTF-8 YAML file"
        ) from error
    raw, root = _parse(text, path=path)
    problems = list(_repeated_keys(root, seen=set()))
    rules: tuple[RuleText, ...] = ()
    if not problems:
        try:
            rules = RuleFile.model_validate(raw).rules
        except ValidationError as error:
            problems = [_problem(dict(detail), raw, root) for detail in error.errors(include_url=False)]
    names: dict[str, int] = {}
    for index, rule in enumerate(rules):
        first = names.setdefault(rule.name, index)
        if first != index:
            lines = [_line(root, ("rules", place, "name")) for place in (index, first)]
            problems.append(f"rule {rule.name} (line {lines[0]}): the name is taken, on line {lines[1]}")
    raise_problems(path, problems)
    return ReadRules(path, rules, root)


def raise_problems(path: Path, problems: list[str]) -> None:
    """One ConfigError for all of them; nothing for none."""
    if problems:
        got = problems[0] if len(problems) == 1 else "\n    - " + "\n    - ".join(problems)
        raise ConfigError(f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}", got=got, do=_DO)


# ---------------------------------------------------------------- YAML with lines


class _Loader(yaml.SafeLoader):
    """SafeLoader for texts: the words on, off, yes and no, dates and times stay what is written, as in YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] not in ("bool", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|false|False)$"), list("tTfF"))


def _parse(text: str, *, path: Path) -> tuple[Any, yaml.Node]:
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            raw = None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{path}{place}: not valid YAML",
            got=str(error.problem or error.context),
            do="quote a regex in single quotes; indent with spaces",
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML", got=str(error), do="write plain `key: value` lines") from error
    if root is None or not isinstance(raw, dict):
        raise ConfigError(f"{path} is no constitution", got="no key `rules`", do="write `rules:` and a list under it")
    return raw, root


def _repeated_keys(node: yaml.Node, *, seen: set[int]) -> Iterator[str]:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated_keys(item, seen=seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if str(key.value) in lines:
                yield f"line {line}: key {key.value!r} stands twice, first on line {lines[str(key.value)]}"
            lines[str(key.value)] = line
            yield from _repeated_keys(value, seen=seen)


def _line(root: yaml.Node, loc: Loc) -> int:
    """Of the deepest part of `loc` that is there."""
    node, line = root, root.start_mark.line + 1
    for step in loc:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == step), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            found = (node.value[step], node.value[step])
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


# ---------------------------------------------------------------- problems in words

_PLAIN = {
    "tuple_type": "write a list: [one, another]",
    "model_type": "write `key: value` lines",
    "string_type": "write a text; quote what looks like a number",
}
"""pydantic's messages that name its own types, in the words of YAML."""


def _problem(detail: dict[str, Any], raw: Any, root: yaml.Node) -> str:
    """'rule flattery (line 4): when.phrasess: unknown key; nearest valid: phrases'."""
    loc: Loc = detail["loc"]
    line = _line(root, loc)
    rule = loc[1] if len(loc) > 1 and loc[0] == "rules" and isinstance(loc[1], int) else None
    where = f"line {line}" if rule is None else f"rule {_name(raw, rule)} (line {line})"
    path = ".".join(str(step) for step in (loc if rule is None else loc[2:]))
    return f"{where}: {f'{path}: ' if path else ''}{_message(detail, loc)}"


def _message(detail: dict[str, Any], loc: Loc) -> str:
    kind: str = detail["type"]
    if kind == "extra_forbidden":
        models = follow(RuleText, loc[2:-1])[1] if len(loc) > 2 else (RuleFile,)
        valid = list(keys_of(models))
        match = nearest(str(loc[-1]), valid)
        return f"unknown key; {f'nearest valid: {match}' if match else 'valid here: ' + ', '.join(valid)}"
    if kind == "missing":
        return "missing"
    got = "" if isinstance(detail["input"], dict | list | tuple) else f"got {detail['input']!r}; "
    message = _PLAIN.get(kind, detail["msg"].removeprefix("Value error, "))
    return f"{got}{message[:1].lower()}{message[1:]}"


def _name(raw: Any, index: int) -> str:
    """As the file has it; its number where it has none."""
    rule = raw["rules"][index]
    name = rule.get("name") if isinstance(rule, dict) else None
    return name if isinstance(name, str) and name.strip() else f"number {index + 1}"
