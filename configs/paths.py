"""Dotted paths through the configuration models: which keys stand where, also behind optional and tagged-union fields.

Only annotations are read, so a path can be checked before anything validates. Legend: a *node* is the type annotation
of one place in the configuration.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

Node = Any
"""A type annotation."""
Models = tuple[type[BaseModel], ...]


def models_at(node: Node) -> Models:
    """The sections that may stand at `node`: none for a plain value, several for a tagged union."""
    if isinstance(node, type) and issubclass(node, BaseModel):
        return (node,)
    origin: Any = get_origin(node)
    if origin is Annotated:
        return models_at(get_args(node)[0])
    if origin in (Union, types.UnionType):
        return tuple(model for part in get_args(node) for model in models_at(part))
    return ()


def tag_of(model: type[BaseModel]) -> str | None:
    """The value of a tagged-union member's `kind`; None for a section that has none."""
    field = model.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is not Literal:
        return None
    tag: str = get_args(field.annotation)[0]
    return tag


def is_mapping(node: Node) -> bool:
    """Whether `node` holds a free mapping, where every key is valid."""
    origin: Any = get_origin(node)
    return origin in (dict, Mapping)


def keys_of(models: Models) -> dict[str, Node]:
    """Key → node, over all `models` (the members of a tagged union together)."""
    return {name: field.annotation for model in models for name, field in model.model_fields.items()}


def narrowed(models: Models, tag: object) -> Models:
    """The member whose `kind` is `tag`; all of them when none is."""
    return tuple(model for model in models if tag_of(model) == tag) or models


def default_tag(parent: Models, key: str) -> str | None:
    """`kind` of the section that `key` has when the file says nothing; None when it is absent by default."""
    for model in parent:
        field = model.model_fields.get(key)
        if field is not None and isinstance(field.default, BaseModel):
            return tag_of(type(field.default))
    return None


def follow(root: type[BaseModel], loc: Iterable[str | int]) -> tuple[str, Models]:
    """A pydantic error location → (dotted path, sections at its end).

    pydantic puts a union's tag into the location; that is no key of the file, so it leaves the path and narrows the
    sections instead.
    """
    path: list[str] = []
    models: Models = (root,)
    for part in loc:
        if len(models) > 1 and part in {tag_of(model) for model in models}:
            models = narrowed(models, part)
            continue
        path.append(str(part))
        node = keys_of(models).get(str(part))
        models = models_at(node) if node is not None else ()
    return ".".join(path), models


def kinds_with(root: type[BaseModel], section: str, key: str) -> list[str]:
    """The kinds that the tagged-union field at dotted path `section` has, as far as they know `key`."""
    models: Models = (root,)
    for part in section.split("."):
        models = models_at(keys_of(models).get(part))
    return [tag for model in models if key in model.model_fields and (tag := tag_of(model)) is not None]


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that looks most like `name`."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None


def nearest_path(root: type[BaseModel], key: str, here: Iterable[str]) -> str | None:
    """The nearest name among `here`; failing that, the dotted path of the same key in another section."""
    match = nearest(key, here)
    if match is not None:
        return match
    return next((path for path in _all_paths((root,), "") if path.rsplit(".", 1)[-1] == key), None)


def _all_paths(models: Models, prefix: str) -> list[str]:
    paths: list[str] = []
    for key, node in keys_of(models).items():
        paths.append(prefix + key)
        paths.extend(_all_paths(models_at(node), f"{prefix}{key}."))
    return paths
