"""Functions that a configuration names as "package.module:function"."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from cluster.errors import ConfigError


def resolve(reference: str, *, key: str) -> Callable[..., Any]:
    """The function behind a reference. `key` is the configuration key that holds it, for the message.

    Raises ConfigError when the reference is malformed, the module does not import, or it has no such function.
    """
    module_name, colon, name = reference.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(
            f"{key} is not a reference to a function", got=repr(reference), do='write "package.module:name"'
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{key}: cannot import {module_name}",
            got=str(error),
            do="install it in this environment, or set PYTHONPATH",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        have = ", ".join(
            sorted(item for item in vars(module) if not item.startswith("_") and callable(vars(module)[item]))
        )
        raise ConfigError(f"{key}: {module_name} has no function {name}", got=f"it has {have}", do="correct the name")
    resolved: Callable[..., Any] = function
    return resolved
