"""Checkpoints: tensors as safetensors, everything else as JSON, in one directory that is complete or absent.

Consumes: groups of named tensors and a JSON-able state, from one writer, the learner. Produces: the same, for the
learner's resume and for readers in other processes. Waits for: the disk only. Always holds: a directory named
`step-…` is whole (written under another name, synced, renamed); what is loaded has the sizes and SHA-256 sums of its
manifest; a failed save changes nothing that was there. Nothing is pickled.

    checkpoints/step-00000040/manifest.json       schema version, step, size and sha256 of each other file
                              state.json
                              policy.safetensors  one file a tensor group
    checkpoints/step-00000040.1/                  the same step saved again; the highest number counts
    checkpoints/pinned.json                       steps that pruning leaves alone
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cluster.errors import CheckpointError
from cluster.files import Json, atomic_directory, atomic_write_text, remove_directory, remove_stale

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
Steps = list[int]
Revisions = list[tuple[int, Path]]
"""(step, directory), oldest first; of one step, in the order they were saved."""
SCHEMA_VERSION: Final = 1
_NAME: Final = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_GROUP: Final = re.compile(r"[a-z][a-z0-9_]*")
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
    """One loaded checkpoint. `tensors`: group → name → CPU tensor. `state`: as saved, tuples as lists."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: Json


class CheckpointStore:
    """The checkpoints of one run, newest `keep_last` kept, and pinned ones. One process writes; any number reads."""

    def __init__(self, directory: Path, *, keep_last: int) -> None:
        if keep_last < 1:
            raise CheckpointError("keep_last must be 1 or more", got=str(keep_last), do="set checkpoint.keep_last")
        self._directory = directory
        self._keep_last = keep_last

    def save(self, step: int, *, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then prune. Returns its directory.

        Tensors of any device and dtype; tied ones are stored once each. Raises CheckpointError, with nothing changed on
        disk, when the disk refuses or `state` is not plain finite JSON with text keys.
        """
        text = _state_json(state)
        _check_groups(step, tensors)
        try:
            remove_stale(self._directory)
            target = self._next_path(step)
            with atomic_directory(target) as directory:
                for group, named in tensors.items():
                    _write_tensors(directory / f"{group}.safetensors", named)
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
        try:
            atomic_write_text(self._pins_path, json.dumps(sorted(self.pinned() | {step})))
        except OSError as error:
            raise _write_error(step, self._directory, error) from error

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


def _check_groups(step: int, tensors: Mapping[str, Tensors]) -> None:
    if step < 0:
        raise CheckpointError("a step counts from 0", got=str(step))
    for group in tensors:
        if not _GROUP.fullmatch(group):
            raise CheckpointError("tensor groups name files", got=repr(group), do="use a-z, 0-9 and _ only")


def _write_tensors(path: Path, named: Tensors) -> None:
    """One safetensors file. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in named.items():
        plain = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, as tied weights do: the second one is copied.
        storage = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    try:
        save_file(stored, path)
    except SafetensorError as error:
        number = errno.ENOSPC if "No space" in str(error) else errno.EFBIG if "too large" in str(error) else errno.EIO
        raise OSError(number, str(error), str(path)) from error


def _manifest(step: int, directory: Path) -> bytes:
    files = {path.name: _FileEntry(path.stat().st_size, _sha256(path)) for path in sorted(directory.iterdir())}
    return msgspec.json.encode(_Manifest(SCHEMA_VERSION, step, files))


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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        files = _verified_files(step, path)
        groups = [name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")]
        tensors = {group: load_file(path / f"{group}.safetensors") for group in groups}
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, msgspec.DecodeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}", got=str(error), do="restore it from a copy"
        ) from error
    return Checkpoint(step=step, path=path, tensors=tensors, state=state)


def _verified_files(step: int, path: Path) -> list[str]:
    """The names in the manifest, each with the size and sum it says. Raises OSError, ValueError, DecodeError."""
    manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=_Manifest)
    if manifest.schema_version != SCHEMA_VERSION:
        raise ValueError(f"schema version {manifest.schema_version}, this build reads {SCHEMA_VERSION}")
    if manifest.step != step:
        raise ValueError(f"manifest.json is that of step {manifest.step}, not {step}")
    for name, expected in manifest.files.items():
        size = (path / name).stat().st_size
        if size != expected.bytes:
            raise ValueError(f"{name} has {size} bytes, its manifest says {expected.bytes}")
        if _sha256(path / name) != expected.sha256:
            raise ValueError(f"{name} does not have the SHA-256 sum of its manifest")
    return list(manifest.files)
