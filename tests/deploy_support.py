"""What is in deploy/ and docs/deploy.md, as the tests see it: Kubernetes objects, and every `keel` command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERAY = DEPLOY / "kuberay"
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile.*"))
SBATCH = DEPLOY / "slurm" / "keel.sbatch"
GUIDE = ROOT / "docs" / "deploy.md"

Json = dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """One Kubernetes object and where it stands."""

    path: Path
    doc: Json

    def __str__(self) -> str:
        return f"{self.path.relative_to(KUBERAY)}:{self.doc['kind']}"


def manifests() -> list[Manifest]:
    return [
        Manifest(path, doc)
        for path in sorted(KUBERAY.rglob("*.yaml"))
        for doc in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]


def of_kind(kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests() if manifest.doc["kind"] == kind]


def pod_templates(doc: Json) -> Iterator[tuple[str, Json]]:
    """(which, pod template) of a workload."""
    spec = doc.get("spec", {})
    if doc["kind"] == "RayJob":
        cluster = spec["rayClusterSpec"]
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]
    elif "template" in spec:
        yield doc["metadata"]["name"], spec["template"]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, scalar) of everything in a document."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


# ---------------------------------------------------------------- command lines

_VALUES = {
    "$@": "ppo_7b_8gpu",
    "$(KEEL_INDEX)": "1003",
    "$KEEL_SHARED/runs": "/shared/runs",
    "/shared/me/models/policy": "/models",
}
"""What the shell or Kubernetes would put in."""
_END = frozenset({"&", "&&", "||", "|", ";"})


@dataclass(frozen=True)
class Command:
    """A `keel` command line: argv without `keel`."""

    where: str
    argv: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.argv)}"


def commands() -> list[Command]:
    """Every `keel` command line in deploy/ and in the guide."""
    return [*_of_manifests(), *_of_dockerfiles(), *_of_shell(SBATCH.name, SBATCH.read_text()), *_of_guide()]


def _of_manifests() -> Iterator[Command]:
    for manifest in manifests():
        if "entrypoint" in manifest.doc.get("spec", {}):
            yield from _of_shell(str(manifest), manifest.doc["spec"]["entrypoint"])
        for _, template in pod_templates(manifest.doc):
            for container in template["spec"]["containers"]:
                if container["image"].startswith("keel-") and "args" in container and "command" not in container:
                    yield Command(str(manifest), tuple(_VALUES.get(part, part) for part in container["args"]))


def _of_dockerfiles() -> Iterator[Command]:
    for path in DOCKERFILES:
        for instruction, text in dockerfile(path):
            if instruction == "RUN" and text.startswith("keel "):
                yield Command(path.name, tuple(shlex.split(text)[1:]))
        last = dict(dockerfile(path))
        yield Command(path.name, (*yaml.safe_load(last["ENTRYPOINT"])[3:], *yaml.safe_load(last["CMD"])))


def dockerfile(path: Path) -> list[tuple[str, str]]:
    """(instruction, the rest) in order, continuation lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def _of_guide() -> Iterator[Command]:
    for block in re.findall(r"^```\n(.*?)^```", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE):
        yield from _of_shell(GUIDE.name, block)
    for path in DOCKERFILES:
        comments = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
        yield from _of_shell(path.name, "\n".join(line for line in comments if line.startswith("docker run")))


def _of_shell(where: str, text: str) -> Iterator[Command]:
    """The words after `keel`, after one of Keel's images in `docker run`, or after the batch script in `sbatch`."""
    text = re.sub(r"\$\([^()]*(?:\([^()]*\)[^()]*)*\)", "SUBSTITUTED", re.sub(r"\\\n\s*", " ", text))
    for line in text.splitlines():
        if line.lstrip().startswith("#") or not re.search(r"\bkeel\b|keel\.sbatch|keel-[cg]pu:", line):
            continue
        words = shlex.split(line, comments=True)
        starts = [
            index
            for index, word in enumerate(words)
            if word == "keel" or (re.match(r"keel-[cg]pu:", word) and words[:2] == ["docker", "run"])
        ]
        if "sbatch" in words:
            starts = [index for index, word in enumerate(words) if word.endswith("keel.sbatch")]
        for start in starts[-1:]:
            argv = words[start + 1 :]
            end = next((index for index, word in enumerate(argv) if word in _END), len(argv))
            argv = [_filled(word) for word in argv[:end]]
            yield Command(where, tuple(["train", *argv] if "sbatch" in words else argv))


def _filled(word: str) -> str:
    for name, value in _VALUES.items():
        word = word.replace(name, value)
    return word
