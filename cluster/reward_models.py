"""Reward models as immutable versions on disk, and which of them scores.

    <run>/rm/versions/<version>/   member_0/ … (Hugging Face directories), manifest.json (RmManifest), the card
    <run>/rm/current.json          the version that scores
    <run>/rm/refused/<version>/    not good enough: all cards, and the weights of the last few; never used

A version is written beside its place and renamed into it, complete or not at all; nothing in it changes afterwards.
Written by whoever trains (one process at a time), read by every role.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from cluster.errors import ModelError
from cluster.files import atomic_write_bytes, fsync_directory, fsync_tree

MANIFEST: Final = "manifest.json"
_TRAIN_AGAIN: Final = "train the reward model again: keel rm CONFIG"

KEPT_REFUSED: Final = 3
"""Of the refused versions, so many of the newest keep their weights."""
NO_MODEL: Final = "none"
"""In place of a version, where no reward model is asked (reward.sources)."""

Verdict = Literal["green", "amber", "red"]


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Mean and population standard deviation of the aggregated raw score over `count` answers of the calibration set;
    where a run's score normaliser starts for this version."""

    mean: float
    std: float
    count: int


class RmManifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of one version. Accuracies are shares of held-out pairs, with a 95 % Wilson interval.

    `version` follows from the weights' bytes. `number` counts a run's versions from 1. `member_scales`: mean
    and standard deviation of each member's raw scores on the calibration set, and `spread_percentiles`: of the standard
    deviation over members there, once they are on one scale, percentiles 0 to 100 (101 numbers), for an ensemble.
    `taken_from`: where members came from that were not trained here.
    """

    version: str
    members: int
    number: int = 1
    parent: str | None = None
    reason: str = "trained"
    data_digest: str = ""
    pairs_train: int = 0
    pairs_held_out: int = 0
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    length_only_accuracy: float | None = None
    member_accuracies: tuple[float, ...] = ()
    calibration: Calibration | None = None
    member_scales: tuple[tuple[float, float], ...] = ()
    spread_percentiles: tuple[float, ...] = ()
    discriminator: bool = False
    """Another model, in discriminator/, is kept out of the reward."""
    discriminator_accuracy: float | None = None
    policy_version: int | None = None
    """Newest policy version whose answers it learned from."""
    dtype: str = "float32"
    """That it serves in; the accuracies are in it."""
    float32_accuracy: float | None = None
    """What the accuracy would be in float32, where that is another type."""
    verdict: Verdict | None = None
    """The validation card's."""
    taken_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredRm:
    """One version, on disk."""

    path: Path
    manifest: RmManifest

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def member_dirs(self) -> list[Path]:
        return [self.path / f"member_{number}" for number in range(self.manifest.members)]

    @property
    def discriminator_dir(self) -> Path | None:
        return self.path / "discriminator" if self.manifest.discriminator else None


class RewardModels:
    """The versions in `<run>/rm`."""

    def __init__(self, rm_dir: Path) -> None:
        self.path = rm_dir

    def exists(self) -> bool:
        """A version scores."""
        return self._current.is_file()

    def current(self) -> StoredRm:
        """The version that scores. Raises ModelError."""
        if not self.exists():
            raise ModelError(
                "no reward model", got=f"{self._current} does not exist", do="run the rm stage: keel rm CONFIG"
            )
        try:
            version = msgspec.json.decode(self._current.read_bytes(), type=dict[str, str])["version"]
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError, OSError) as error:
            raise ModelError("damaged reward model", got=f"{self._current}: {error!r}", do=_TRAIN_AGAIN) from error
        return self.get(version)

    def get(self, version: str) -> StoredRm:
        """One version, its members all there. Raises ModelError."""
        path = self.path / "versions" / version
        manifest = read_manifest(path)
        stored = StoredRm(path, manifest)
        missing = [directory.name for directory in stored.member_dirs if not directory.is_dir()]
        if missing:
            raise ModelError(
                "incomplete reward model",
                got=f"{path} should hold {manifest.members} members, missing: {', '.join(missing)}",
                do=_TRAIN_AGAIN,
            )
        return stored

    def versions(self) -> list[StoredRm]:
        """All accepted versions, oldest first."""
        found = [path for path in (self.path / "versions").glob("*") if (path / MANIFEST).is_file()]
        return sorted((StoredRm(path, read_manifest(path)) for path in found), key=lambda one: one.manifest.number)

    @property
    def next_number(self) -> int:
        """Of the next version, refused ones counted."""
        known = [path.parent for path in self.path.glob(f"*/*/{MANIFEST}")]
        return 1 + max((read_manifest(path).number for path in known), default=0)

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """A directory to build a version in; gone at the end unless `publish` or `refuse` moved it. What a trainer that
        was killed left is removed. Raises ModelError when the disk refuses."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.clear_drafts()
            directory = Path(tempfile.mkdtemp(prefix="draft.", dir=self.path))
            try:
                yield directory
            finally:
                shutil.rmtree(directory, ignore_errors=True)
        except OSError as error:
            raise ModelError(
                f"cannot write to {self.path}", got=str(error), do="free some disk space or choose another runs_dir"
            ) from error

    def clear_drafts(self) -> None:
        """Remove what a trainer that was killed left. Nobody may be training."""
        for abandoned in self.path.glob("draft.*"):
            shutil.rmtree(abandoned, ignore_errors=True)

    def publish(self, draft: Path, manifest: RmManifest, *, make_current: bool = True) -> StoredRm:
        """Give a draft its place for good. The same weights published before stay as they are."""
        stored = self._move(draft, manifest, place="versions")
        if make_current:
            self.make_current(manifest.version)
        return stored

    def refuse(self, draft: Path, manifest: RmManifest) -> Path:
        """Keep a draft to look at, and drop the weights of older ones. Returns where it lies."""
        path = self._move(draft, manifest, place="refused").path
        manifests = [file.parent for file in self.path.glob(f"refused/*/{MANIFEST}")]
        manifests.sort(key=lambda version: read_manifest(version).number)
        for version in manifests[:-KEPT_REFUSED]:
            for weights in version.rglob("*.safetensors"):
                weights.unlink()
        return path

    def make_current(self, version: str) -> None:
        """From now on this version scores; announcing it to running workers is the caller's. Raises ModelError."""
        self.get(version)
        atomic_write_bytes(self._current, msgspec.json.encode({"version": version}))

    @property
    def _current(self) -> Path:
        return self.path / "current.json"

    def _move(self, draft: Path, manifest: RmManifest, *, place: str) -> StoredRm:
        target = self.path / place / manifest.version
        if (target / MANIFEST).is_file():
            return StoredRm(target, read_manifest(target))
        (draft / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
        draft.chmod(0o755)  # mkdtemp's is for its owner alone; other nodes may read as another user
        target.parent.mkdir(parents=True, exist_ok=True)
        fsync_tree(draft)
        draft.rename(target)
        fsync_directory(target.parent)
        return StoredRm(target, manifest)


def model_of(rm_version: str | None) -> str | None:
    """The reward model behind a scale of scores: a version, `version~tag` where other sources count too (the tag names
    them). None where there is none."""
    version = (rm_version or NO_MODEL).partition("~")[0]
    return None if version == NO_MODEL else version


def read_manifest(directory: Path) -> RmManifest:
    """Raises ModelError for none, or one that is damaged."""
    path = directory / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=RmManifest)
    except FileNotFoundError as error:
        raise ModelError("no such reward model", got=f"{path} does not exist", do=_TRAIN_AGAIN) from error
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError("damaged reward model manifest", got=f"{path}: {error!r}", do=_TRAIN_AGAIN) from error


def version_of(directory: Path) -> str:
    """`rm-` and 12 hex digits over the bytes of every member's safetensors files, in order."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("member_*/*.safetensors")):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"rm-{digest.hexdigest()[:12]}"
