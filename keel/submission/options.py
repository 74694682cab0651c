"""What `keel submit` may be told. Declared here, light enough for the command line's start."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """One field an option, in the order of the help."""

    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A YAML file or a preset's name: the run to start.")
    ] = None
    address: Annotated[
        str,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, e.g. http://head:8265."),
    ]
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key. Repeatable.")
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run of this name stopped.")] = False
    follow: Annotated[bool, typer.Option(help="Print the job's log until it ends.")] = True
    name: Annotated[
        str | None, typer.Option(help="The job's id. Default: keel-, the run's name and six random digits.")
    ] = None
    working_dir: Annotated[
        Path | None,
        typer.Option(help="Also upload this folder's files, less what git ignores; the job can import from it."),
    ] = None
    env_file: Annotated[
        Path | None, typer.Option(help="NAME=VALUE lines for the job's environment. Anyone on the cluster can read it.")
    ] = None
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=FILE]",
            help="NAME must be set in the cluster's environment, or is read from FILE there. Values stay on the "
            "cluster. KEEL_REDIS_URL names the queue server. Repeatable.",
        ),
    ] = None
    status: Annotated[str | None, typer.Option(metavar="JOB", help="Print a job's state.")] = None
    logs: Annotated[
        str | None, typer.Option(metavar="JOB", help="Print a job's log, to its end unless --no-follow.")
    ] = None
    stop: Annotated[
        str | None, typer.Option(metavar="JOB", help="Have a job save a checkpoint and end, and wait for that.")
    ] = None


def command_from(options: type[Any], run: Callable[[Any], None]) -> Callable[..., None]:
    """A function that typer reads like one with a parameter for each field of the dataclass `options`; it calls `run`
    with an instance. For commands with more options than a signature reads well with. `run`'s docstring is the help."""

    def command(**values: Any) -> None:
        run(options(**values))

    hints = typing.get_type_hints(options, include_extras=True)
    command.__doc__ = run.__doc__
    command.__annotations__ = hints | {"return": None}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in dataclasses.fields(options)
        ]
    )
    return command
