"""`keel submit`: a run as a job of a Ray cluster, and that job's log, state and end.

The configuration is checked here, and refused if no cluster could run it, before anything is uploaded. On the cluster
the job is `keel train` on the head node.
Exit codes: 0 the job succeeded, 1 it failed, 130 it was stopped, or Ctrl-C left it running.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import typer

from cluster.errors import ConfigError
from configs.load import load_config
from keel.ray_environment import prepare_ray_environment
from keel.submission.options import SubmitOptions
from keel.submission.package import CONFIG_NAME, plan_package, write_package
from keel.submission.ray_jobs import JobState, RayJobs

STOP_WAIT_S: Final = 300
"""How long Ray lets a job save and wind down before it kills it; left alone, Ray gives 3 s. A learner finishes its
step first."""
_EXIT_CODES: Final = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 130}
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_NAME: Final = re.compile(r"(^|_)(TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS?|API_?KEY|ACCESS_KEY|REDIS_URL)(_|$)")


@dataclass(frozen=True)
class Secret:
    """A variable that the job needs, from the cluster's environment, or from a file there."""

    name: str
    file: str | None


def submit(options: SubmitOptions) -> int:
    """Do what the options ask for. Returns the exit code."""
    prepare_ray_environment()
    others = [job for job in (options.status, options.logs, options.stop) if job is not None]
    if len(others) + (options.config is not None) != 1:
        raise ConfigError(
            "keel submit takes one of CONFIG, --status JOB, --logs JOB and --stop JOB",
            do="for example: keel submit demo --address http://head:8265 --set runs_dir=/shared/runs",
        )
    if options.config is not None:
        return _start(options, config=options.config)
    jobs = RayJobs(options.address)
    if options.status is not None:
        _show(jobs.state(options.status), err=False)
        return 0
    if options.stop is not None:
        return _stop(jobs, options.stop)
    assert options.logs is not None
    if options.follow:
        return _follow(jobs, options.logs)
    typer.echo(jobs.log(options.logs), nl=False)
    return 0


def _start(options: SubmitOptions, *, config: str) -> int:
    wanted = [parse_secret(text) for text in options.secret or []]
    env = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)} | read_env_file(options.env_file)
    _refuse_impossible(config, overrides=options.overrides or [])
    package = plan_package(
        config,
        overrides=options.overrides or [],
        working_dir=options.working_dir,
        secrets=[secret.name for secret in wanted],
    )
    with tempfile.TemporaryDirectory(prefix="keel-submit-") as folder:
        archive = Path(folder) / "job.zip"
        write_package(package, archive)
        jobs = RayJobs(options.address)
        for note in package.notes:
            typer.echo(f"keel: {note}", err=True)
        job = options.name or f"keel-{package.config.name}-{secrets.token_hex(3)}"
        jobs.submit(job=job, entrypoint=entrypoint(secrets=wanted, resume=options.resume), package=archive, env=env)
    typer.echo(f"keel: submitted {job}; it runs into {package.config.run_dir} on the cluster", err=True)
    if options.follow:
        return _follow(jobs, job)
    _say_how_to_go_on(jobs, job)
    return 0


def _refuse_impossible(config: str, *, overrides: Sequence[str]) -> None:
    """Raise ConfigError for what no cluster can run; `keel train` there sees whether this one can."""
    from keel.planning.plan import impossible_anywhere

    # As the job will read it, but with the paths of this machine.
    findings = impossible_anywhere(load_config(config, overrides=[*overrides, "ray.address=auto"]))
    if findings:
        raise ConfigError(
            f"{config}: no cluster can run this",
            got="; ".join(f"{finding.area}: {finding.what}" for finding in findings),
            do="; ".join(f"set {finding.do}" for finding in findings),
        )


def entrypoint(*, secrets: Sequence[Secret], resume: bool) -> str:
    """The job's shell command. It names secrets and never holds one; `exec` makes the driver the process that Ray
    signals.

    >>> entrypoint(secrets=[Secret("HF_TOKEN", "/run/hf")], resume=True)
    'HF_TOKEN="$(cat /run/hf)" && export HF_TOKEN && exec keel train keel-job.yaml --resume'
    """
    steps = []
    for secret in secrets:
        if secret.file is None:
            steps.append(f': "${{{secret.name}:?must be set in the environment of the head node}}"')
        else:
            steps.append(f'{secret.name}="$(cat {shlex.quote(secret.file)})"')
            steps.append(f"export {secret.name}")
    steps.append(f"exec keel train {CONFIG_NAME}{' --resume' if resume else ''}")
    return " && ".join(steps)


def parse_secret(text: str) -> Secret:
    """NAME or NAME=/file/on/the/cluster. Raises ConfigError, which does not repeat what may be a secret."""
    name, equals, file = text.partition("=")
    if not _NAME.fullmatch(name) or (equals and not file.startswith("/")):
        raise ConfigError(
            "--secret takes the name of a variable, or NAME=/FILE with an absolute path on the cluster",
            got=f"{name}=…" if equals else repr(name),
            do="never give the value: it stays on the cluster",
        )
    return Secret(name, file or None)


def read_env_file(path: Path | None) -> dict[str, str]:
    """NAME=VALUE lines; # starts a comment line. Raises ConfigError, also for a name that looks like a secret's."""
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot read --env-file", got=f"{path}: {error}", do="give a text file") from error
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.strip().partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ConfigError(f"{path}:{number}: not NAME=VALUE", do="one variable a line, without `export`")
        if _SECRET_NAME.search(name.upper()):
            raise ConfigError(
                f"{path}:{number}: {name} looks like a secret, and a job's environment is readable on the cluster",
                do=f"set it in the cluster's own environment and give --secret {name}",
            )
        found[name] = value
    return found


def _follow(jobs: RayJobs, job: str) -> int:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        state = asyncio.run(jobs.follow(job, write=write))
    except KeyboardInterrupt:
        if sys.stdin.isatty() and typer.confirm(f"\nkeel: stop {job} too?", default=False, err=True):
            return _stop(jobs, job)
        typer.echo("", err=True)
        _say_how_to_go_on(jobs, job)
        return _EXIT_CODES["STOPPED"]
    _show(state)
    return _EXIT_CODES[state.status]


def _stop(jobs: RayJobs, job: str) -> int:
    state = jobs.state(job)
    if not state.ended:
        jobs.stop(job)
        typer.echo(f"keel: {job} saves and ends; at most {STOP_WAIT_S} s", err=True)
        state = jobs.wait(job, timeout_s=STOP_WAIT_S + 30.0)
    _show(state)
    return _EXIT_CODES[state.status]


def _show(state: JobState, *, err: bool = True) -> None:
    code = "" if state.driver_exit_code is None else f", exit code {state.driver_exit_code}"
    typer.echo(f"keel: {state.job}: {state.status.lower()}{code}", err=err)
    if state.status == "FAILED" and state.driver_exit_code is None:
        typer.echo(state.message, err=err)  # Not the driver's own failure, which its log shows.


def _say_how_to_go_on(jobs: RayJobs, job: str) -> None:
    for verb in ("logs", "status", "stop"):
        typer.echo(f"  keel submit --{verb} {job} --address {jobs.address}", err=True)
