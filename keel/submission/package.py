"""What `keel submit` uploads, as one zip file: the checked configuration, the local files that it names, and a folder
of the user's code. No Ray here.

The rule for paths: a relative path is a file of this machine and travels with the job; an absolute path is the
cluster's.
"""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

from cluster.errors import ConfigError
from configs.checks import named_functions
from configs.load import dump_config, load_config
from configs.run import FileSource, PretrainedModel, RewardSection, RmSection, RunConfig, Section
from reward_service.rewards.constitution_file import read_rules

CONFIG_NAME: Final = "keel-job.yaml"
MAX_PACKAGE_BYTES: Final = 100 << 20
"""Ray's job server takes no larger request (measured on 2.60; packages that a driver uploads itself may have 512)."""
_FILES: Final = "keel-files"
_EXCLUDED: Final = frozenset({".git", ".venv", "__pycache__", "node_modules", "runs"})
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_SHIPPED: Final = ("examples",)

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Package:
    """config: as the job will read it, with the names that its files have there. files: name in the zip → local file.
    notes: what the user should know before the job starts."""

    config: RunConfig
    files: dict[str, Path]
    notes: list[str] = field(default_factory=list)


def plan_package(config: str, *, overrides: Sequence[str], working_dir: Path | None, secrets: Sequence[str]) -> Package:
    """Check the configuration as the job will see it, and find what to upload. Raises ConfigError."""
    run = load_config(config, overrides=[*overrides, "ray.address=auto"])
    _check_place(run, secrets=secrets)
    package = Package(config=run, files=_folder(working_dir))
    if run.redis.url is None and "KEEL_REDIS_URL" not in secrets:
        package.notes.append(
            "no redis.url and no --secret KEEL_REDIS_URL: the driver starts a queue server of its own on the head node"
        )
    package.notes.extend(_unshipped_modules(run, working_dir=working_dir, files=package.files))
    return _with_local_files(package)


def write_package(package: Package, target: Path) -> None:
    """Write the zip; the same content gives the same bytes. Raises ConfigError when it is too large for Ray."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(CONFIG_NAME, _EPOCH), dump_config(package.config))
        for name, path in sorted(package.files.items()):
            info = zipfile.ZipInfo.from_file(path, name, strict_timestamps=False)
            info.date_time, info.compress_type = _EPOCH, zipfile.ZIP_DEFLATED
            with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as entry:
                while block := source.read(1 << 20):
                    entry.write(block)
    size = target.stat().st_size
    if size > MAX_PACKAGE_BYTES:
        largest = sorted(package.files.items(), key=lambda item: -item[1].stat().st_size)[:3]
        sizes = ", ".join(f"{name} {path.stat().st_size / 2**20:.0f} MiB" for name, path in largest)
        raise ConfigError(
            f"the job's files are too large to upload: {MAX_PACKAGE_BYTES >> 20} MiB is Ray's limit",
            got=f"{size / 2**20:.0f} MiB compressed; the largest: {sizes}",
            do="put them on storage that the cluster sees and give their absolute paths",
        )


def _check_place(run: RunConfig, *, secrets: Sequence[str]) -> None:
    if not run.runs_dir.is_absolute():
        raise ConfigError(
            "a submitted run needs a runs_dir that outlives the job and that every node sees",
            got=f"runs_dir: {run.runs_dir}, relative to a folder that Ray deletes",
            do="give shared storage, for example --set runs_dir=/shared/runs",
        )
    url = run.redis.url
    if url is not None and "KEEL_REDIS_URL" in secrets:
        raise ConfigError(
            "redis.url and --secret KEEL_REDIS_URL exclude each other", do="leave out redis.url; the secret is the URL"
        )
    parts = urlsplit(url or "")
    if parts.password or "password=" in parts.query:
        raise ConfigError(
            "redis.url holds a password, which would lie readable on the cluster",
            got=f"…@{parts.netloc.rpartition('@')[2]}",
            do="put the URL into the cluster's environment as KEEL_REDIS_URL and give --secret KEEL_REDIS_URL",
        )


# ---------------------------------------------------------------- files that the configuration names


def _with_local_files(package: Package) -> Package:
    run, files, notes = package.config, dict(package.files), package.notes
    sources: dict[str, FileSource] = {}
    for name in ("preferences", "prompts", "sft"):
        source = getattr(run.data, name)
        if isinstance(source, FileSource):
            sources[name] = _uploaded(source, key=f"data.{name}.path", files=files, notes=notes)
    run = _updated(run, data=_updated(run.data, **sources))
    if isinstance(run.model, PretrainedModel):
        run = _updated(run, model=_uploaded_model(run.model, files=files, notes=notes))
    run = _updated(run, rm=_uploaded_reward_models(run.rm, files=files, notes=notes))
    run = _updated(run, reward=_uploaded_constitution(run.reward, files=files, notes=notes))
    return Package(config=run, files=files, notes=notes)


def _uploaded(source: FileSource, *, key: str, files: dict[str, Path], notes: list[str]) -> FileSource:
    if source.path.is_absolute():
        notes.append(f"{key} is read on the cluster: {source.path}")
        return source
    if not source.path.is_file():
        raise ConfigError(
            f"{key}: no such file here",
            got=str(source.path),
            do="a relative path is uploaded from this folder; give an absolute one for a file of the cluster",
        )
    name = f"{_FILES}/{key.split('.')[1]}/{source.path.name}"
    files[name] = source.path
    notes.append(f"{key} is uploaded: {source.path}")
    return _updated(source, path=Path(name))


def _uploaded_constitution(reward: RewardSection, *, files: dict[str, Path], notes: list[str]) -> RewardSection:
    path = reward.constitution
    if path is None:
        return reward
    if path.is_absolute():
        notes.append(f"reward.constitution is read on the cluster: {path}")
        return reward
    if not path.is_file():
        raise ConfigError(
            "reward.constitution: no such file here", got=str(path), do="give a file of rules; see docs/rewards.md"
        )
    name = f"{_FILES}/constitution/{path.name}"
    files[name] = path
    notes.append(f"reward.constitution is uploaded: {path}")
    return _updated(reward, constitution=Path(name))


def _uploaded_model(model: PretrainedModel, *, files: dict[str, Path], notes: list[str]) -> PretrainedModel:
    changed: dict[str, str] = {}
    for key in ("path", "tokenizer"):
        value = getattr(model, key)
        if value is None:
            continue
        if Path(value).is_absolute() or not Path(value).is_dir():
            notes.append(f"model.{key} is read on the cluster: {value}")
            continue
        notes.append(f"model.{key} is uploaded: {value}")
        changed[key] = _uploaded_folder(Path(value), name=f"{_FILES}/model-{key}", files=files)
    return _updated(model, **changed)


def _uploaded_reward_models(rm: RmSection, *, files: dict[str, Path], notes: list[str]) -> RmSection:
    models: list[Path] = []
    for number, path in enumerate(rm.models):
        if path.is_absolute():
            notes.append(f"rm.models.{number} is read on the cluster: {path}")
            models.append(path)
        elif path.is_dir():
            notes.append(f"rm.models.{number} is uploaded: {path}")
            models.append(Path(_uploaded_folder(path, name=f"{_FILES}/reward-model-{number}", files=files)))
        else:
            raise ConfigError(
                f"rm.models.{number}: no such folder here",
                got=str(path),
                do="a relative path is uploaded from this folder; give an absolute one for a folder of the cluster",
            )
    return _updated(rm, models=tuple(models))


def _uploaded_folder(folder: Path, *, name: str, files: dict[str, Path]) -> str:
    files.update({f"{name}/{file.relative_to(folder)}": file for file in folder.rglob("*") if file.is_file()})
    return name


def _updated(section: S, **changes: object) -> S:
    """A copy with other values, which are known to be valid."""
    return section.model_copy(update=changes)


# ---------------------------------------------------------------- the user's code


def _functions_in_rules(constitution: Path) -> dict[str, str]:
    if not constitution.is_file():
        return {}
    rules = read_rules(constitution).rules
    return {f"reward.constitution, rule {rule.name}": rule.when.function for rule in rules if rule.when.function}


def _unshipped_modules(run: RunConfig, *, working_dir: Path | None, files: dict[str, Path]) -> Iterator[str]:
    references = named_functions(run)
    if run.reward.constitution is not None:
        references |= _functions_in_rules(run.reward.constitution)
    for key, reference in references.items():
        module = reference.partition(":")[0]
        path = module.replace(".", "/")
        if module.split(".")[0] in _SHIPPED or f"{path}.py" in files or f"{path}/__init__.py" in files:
            continue
        where = f"it is not in {working_dir}" if working_dir else "no --working-dir is given"
        yield f"{key} = {reference} must be importable on the cluster: {where}"


def _folder(working_dir: Path | None) -> dict[str, Path]:
    """Name in the zip → file, for what lies under the folder and git does not ignore; without git, for all but usual
    byproducts."""
    if working_dir is None:
        return {}
    if not working_dir.is_dir():
        raise ConfigError("--working-dir is no folder", got=str(working_dir), do="give the folder with your modules")
    listed = subprocess.run(
        ["git", "-C", str(working_dir), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if listed.returncode == 0:
        names = [name for name in listed.stdout.split("\0") if name]
    else:
        names = [path.relative_to(working_dir).as_posix() for path in working_dir.rglob("*")]
    found = {name: working_dir / name for name in names if not _EXCLUDED & set(Path(name).parts)}
    return {name: path for name, path in found.items() if path.is_file()}
