"""Checkpoints: tensors as safetensors, everything else as JSON, in one directory that is complete or absent.

Consumes: a JSON-able state, from one writer, the learner's first rank, and tensors, from all its ranks. Produces: the
same, for the learner's resume on any number of ranks and for readers in other processes. Waits for: the disk, and in
`save` for what writes the tensors. Always holds: a directory named `step-…` is whole (written under another name,
synced, renamed); what is loaded has the sizes and SHA-256 sums of its manifest; a failed save changes nothing that was
there. Nothing is pickled. Ranks on several nodes need the directory on a file system that all of them see.

    checkpoints/step-00000040/manifest.json       schema version, step, size and sha256 of each other file
                              state.json
                              shard-….safetensors of each rank: cluster/checkpoint_tensors.py
    checkpoints/step-00000040.1/                  the same step saved again; the highest number counts
    checkpoints/pinned.json                       steps that pruning leaves alone
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from cluster.errors import CheckpointError
from cluster.files import Json, atomic_directory, atomic_write_text, remove_directory, remove_stale

Steps = list[int]
Revisions = list[tuple[int, Path]]
"""(step, directory), oldest first; of one step, in the order they were saved."""
SCHEMA_VERSION: Final = 2
_NAME: Final = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_HASH_THREADS: Final = 8
_LOG: Final = logging.getLogger(__name__)


class _FileEntry(msgspec.Struct, frozen=True):
    bytes: int
    sha256: str


class _Manifest(msgspec.Struct, frozen=True):
    schema_version: int
    step: int
    files: dict[str, _FileEntry]


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint. `state`: as saved, tuples as lists. The tensors are read from `path` by
    cluster/checkpoint_tensors.py."""

    step: int
    path: Path
    state: Json


class CheckpointStore:
    """The checkpoints of one run, newest `keep_last` kept, and pinned ones. One process writes; any number reads."""

    def __init__(self, directory: Path, *, keep_last: int) -> None:
        if keep_last < 1:
            raise CheckpointError("keep_last must be 1 or more", got=str(keep_last), do="set checkpoint.keep_last")
        self._directory = directory
        self._keep_last = keep_last

    def save(self, step: int, *, state: Mapping[str, Any], write_tensors: Callable[[Path], None]) -> Path:
        """Write a checkpoint, then prune. Returns its directory.

        `write_tensors` fills the directory that it is given with the tensors' files, and raises OSError when it cannot.
        Raises CheckpointError, with nothing changed on disk, when the disk refuses or `state` is not plain finite JSON
        with text keys.
        """
        text = _state_json(state)
        if step < 0:
            raise CheckpointError("a step counts from 0", got=str(step))
        try:
            remove_stale(self._directory)
            target = self._next_path(step)
            with atomic_directory(target) as directory:
                write_tensors(directory)
                (directory / "state.json").write_text(text, encoding="utf-8")
                (directory / "manifest.json").write_bytes(_manifest(step, directory))
        except OSError as error:
            raise _write_error(step, self._directory, error) from error
        self._prune()
        return target

    def list(self) -> Steps:
        """Steps with a complete checkpoint, oldest first. They are verified when loaded, not here."""
        return sorted({step for step, _ in self._revisions()})

    def latest(self) -> int | None:
        """The newest step of `list`."""
        steps = self.list()
        return steps[-1] if steps else None

    def load(self, step: int | None = None) -> Checkpoint:
        """The checkpoint of `step`; with None, the newest that is undamaged, with a warning for each one passed over.

        Raises CheckpointError: none there, or (of a named step) damaged.
        """
        wanted = [(at, path) for at, path in self._revisions() if step is None or at == step]
        if not wanted:
            have = ", ".join(map(str, self.list())) or "none"
            raise CheckpointError(
                f"no checkpoint {'' if step is None else f'of step {step} '}in {self._directory}",
                got=f"steps there: {have}",
                do="start without --resume, or name one of these steps",
            )
        failures: list[str] = []
        for at, path in reversed(wanted):
            try:
                return _read(at, path)
            except CheckpointError as error:
                failures.append(f"{error.what} ({error.got})")
                _LOG.warning("checkpoint %s is damaged, trying the one before: %s", path, error.got)
        raise CheckpointError(
            f"no undamaged checkpoint in {self._directory}"
            if step is None
            else f"checkpoint of step {step} is damaged",
            got="; ".join(failures),
            do="restore the files from a copy, or delete the directory and start from an earlier step",
        )

    def pin(self, step: int) -> None:
        """Keep `step` whatever pruning does. Raises CheckpointError when there is no such checkpoint."""
        if step not in self.list():
            raise CheckpointError(
                f"cannot pin step {step}", got=f"checkpoints of steps {self.list()}", do="pin a step that is saved"
            )
        self._write_pins(self.pinned() | {step}, step)

    def unpin(self, step: int) -> None:
        """Leave `step`, pinned or not, to the next pruning. Raises CheckpointError."""
        pinned = self.pinned()
        if step in pinned:
            self._write_pins(pinned - {step}, step)

    def pinned(self) -> frozenset[int]:
        """The pinned steps. Raises CheckpointError when their list is unreadable: pruning must not guess."""
        try:
            steps = json.loads(self._pins_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read {self._pins_path}", got=str(error), do="mend it: a JSON list of step numbers"
            ) from error
        return frozenset(steps)

    def _write_pins(self, steps: Iterable[int], changed: int) -> None:
        try:
            atomic_write_text(self._pins_path, json.dumps(sorted(steps)))
        except OSError as error:
            raise _write_error(changed, self._directory, error) from error

    @property
    def _pins_path(self) -> Path:
        return self._directory / "pinned.json"

    def _revisions(self) -> Revisions:
        found: list[tuple[int, int, Path]] = []
        for path in self._directory.iterdir() if self._directory.is_dir() else ():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1]), int(match[2] or 0), path))
        return [(step, path) for step, _, path in sorted(found)]

    def _next_path(self, step: int) -> Path:
        """A new name for `step`: a directory cannot be replaced in one operation, so a repeated step gets a number."""
        revisions = [_NAME.fullmatch(path.name) for at, path in self._revisions() if at == step]
        taken = [int(match[2] or 0) for match in revisions if match]
        suffix = f".{max(taken) + 1}" if taken else ""
        return self._directory / f"step-{step:08d}{suffix}"

    def _prune(self) -> None:
        """Delete all but the newest of each step, the newest `keep_last` steps and the pinned ones."""
        keep = set(self.list()[-self._keep_last :]) | self.pinned()
        newest = dict(self._revisions())
        for step, path in self._revisions():
            if step in keep and path == newest[step]:
                continue
            try:
                remove_directory(path)
            except OSError as error:
                _LOG.warning("cannot delete the old checkpoint %s: %s", path, error)


# ---------------------------------------------------------------- writing


def _state_json(state: Mapping[str, Any]) -> str:
    """JSON text. Raises CheckpointError on NaN, infinities, other types, and keys that JSON would turn into text."""
    key = _first_non_text_key(state, "state")
    if key is not None:
        raise CheckpointError("state keys must be text", got=key, do="convert the key with str() before saving")
    try:
        return json.dumps(state, allow_nan=False, ensure_ascii=False, indent=1)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            "the state is not plain finite JSON", got=str(error), do="a NaN here means that training diverged before it"
        ) from error


def _first_non_text_key(value: object, path: str) -> str | None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{key!r} ({type(key).__name__}) in {path}"
            found = _first_non_text_key(item, f"{path}.{key}")
            if found:
                return found
    elif isinstance(value, list | tuple):
        return next(filter(None, (_first_non_text_key(item, f"{path}[]") for item in value)), None)
    return None


def _manifest(step: int, directory: Path) -> bytes:
    paths = sorted(directory.iterdir())
    files = {
        path.name: _FileEntry(path.stat().st_size, digest)
        for path, digest in zip(paths, _sha256_all(paths), strict=True)
    }
    return msgspec.json.encode(_Manifest(SCHEMA_VERSION, step, files))


def _sha256_all(paths: Iterable[Path]) -> list[str]:
    """Several files at a time: large ones keep a core busy each, and training waits for them."""
    with ThreadPoolExecutor(min(_HASH_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_error(step: int, directory: Path, error: OSError) -> CheckpointError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free disk space" if full else "check that the disk is there, writable and healthy"
    return CheckpointError(
        f"cannot write the checkpoint of step {step} to {directory}",
        got=str(error),
        do=f"{remedy}, then resume: the checkpoints written before are untouched",
    )


# ---------------------------------------------------------------- reading


def _read(step: int, path: Path) -> Checkpoint:
    """Verify against the manifest, then read. Raises CheckpointError."""
    try:
        _verify(step, path)
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}", got=str(error), do="restore it from a copy"
        ) from error
    return Checkpoint(step=step, path=path, state=state)


def _verify(step: int, path: Path) -> None:
    """Every file has the size and sum that the manifest says. Raises OSError, ValueError, DecodeError."""
    manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=_Manifest)
    if manifest.schema_version != SCHEMA_VERSION:
        raise ValueError(
            f"schema version {manifest.schema_version}, this build reads {SCHEMA_VERSION}; go on with the build that "
            "wrote it, or start over"
        )
    if manifest.step != step:
        raise ValueError(f"manifest.json is that of step {manifest.step}, not {step}")
    for name, expected in manifest.files.items():
        size = (path / name).stat().st_size
        if size != expected.bytes:
            raise ValueError(f"{name} has {size} bytes, its manifest says {expected.bytes}")
    sums = _sha256_all(path / name for name in manifest.files)
    for (name, expected), found in zip(manifest.files.items(), sums, strict=True):
        if found != expected.sha256:
            raise ValueError(f"{name} does not have the SHA-256 sum of its manifest")
