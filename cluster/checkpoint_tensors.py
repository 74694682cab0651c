"""Tensors in a checkpoint's directory: torch.distributed.checkpoint with its safetensors storage, nothing pickled.

Each process writes what it holds of each tensor to files of its own; where each piece belongs is in the file's header.
What any number of processes wrote, any number reads, each what it holds. A `collective` call is made by all members of
the default process group together, and all see the same outcome; otherwise the caller is alone.

    shard-00001-model-00001-of-00002.safetensors     of the first process; names are "<group>/<tensor>"
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Groups = Mapping[str, Mapping[str, "Tensor"]]
FILE_BYTES: Final = 2 << 30
"""About the size of a file: while one is written, it is in host memory twice."""


def write_tensors(directory: Path, groups: Groups, *, collective: bool) -> None:
    """Write them all, sharded (DTensor) or whole, of any device and dtype; whole ones are the same on every process and
    written once. Raises OSError when the disk of any process refuses."""
    from torch import distributed
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    flat = _apart({name: tensor.detach().contiguous() for name, tensor in _flat(groups).items()})
    files = _files(flat, bytes_each=FILE_BYTES * (distributed.get_world_size() if collective else 1))
    writer = HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=files, save_distributed=True)
    try:
        with _quietly():
            save(flat, storage_writer=writer, no_dist=not collective)
    except CheckpointException as error:
        raise _as_os_error(error) from error


def read_tensors(directory: Path, into: Groups, *, collective: bool) -> None:
    """Read them all into these live tensors, in place. Raises CheckpointError when names or shapes are not the same."""
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    flat = {name: tensor.detach() for name, tensor in _flat(into).items()}
    saved = _saved(directory)
    wrong = [name for name in flat if name in saved and tuple(flat[name].shape) != tuple(saved[name].size)]
    if saved.keys() != flat.keys() or wrong:
        raise CheckpointError(
            "the checkpoint does not fit the model",
            got=f"{len(saved)} tensors for {len(flat)}; only on one side {sorted(saved.keys() ^ flat.keys())[:3]}; "
            f"misshapen {wrong[:3]}",
            do="resume with the model and settings that the checkpoint was written from",
        )
    reader = HuggingFaceStorageReader(str(directory))
    try:
        with torch.no_grad(), _quietly():
            load(flat, storage_reader=reader, no_dist=not collective)
    except CheckpointException as error:
        raise CheckpointError(
            f"cannot read the tensors in {directory}", got=_cause(error), do="restore the files from a copy"
        ) from error


def saved_groups(directory: Path) -> frozenset[str]:
    """The groups that have tensors there."""
    return frozenset(name.partition("/")[0] for name in _saved(directory))


def read_whole(directory: Path) -> dict[str, dict[str, Tensor]]:
    """Every tensor, whole and on the CPU: group → name → tensor. For one process by itself."""
    import torch
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    flat: dict[str, Any] = {
        name: torch.empty(saved.size, dtype=saved.properties.dtype) for name, saved in _saved(directory).items()
    }
    reader = HuggingFaceStorageReader(str(directory))
    with _quietly():
        load(flat, storage_reader=reader, no_dist=True)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        group, _, own = name.partition("/")
        groups.setdefault(group, {})[own] = tensor
    return groups


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's warning that one process by itself is one process by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _flat(groups: Groups) -> dict[str, Tensor]:
    return {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


def _files(flat: Mapping[str, Tensor], *, bytes_each: int) -> dict[str, int]:
    """Which file, from 1, each tensor goes to: `bytes_each` of whole tensors to one, unless a single one is larger."""
    files, number, room = {}, 0, 0
    for name, tensor in flat.items():
        if tensor.nbytes > room:
            number, room = number + 1, bytes_each
        room -= tensor.nbytes
        files[name] = max(number, 1)
    return files


def _apart(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory, as tied weights do: the second one is copied. Shards never do."""
    from torch.distributed.tensor import DTensor

    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in flat.items():
        storage = id(tensor) if isinstance(tensor, DTensor) else tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return apart


def _saved(directory: Path) -> dict[str, Any]:
    """Name → size and properties of what is there. Raises CheckpointError."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        metadata = HuggingFaceStorageReader(str(directory)).read_metadata()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the tensors in {directory}", got=str(error), do="restore the files from a copy"
        ) from error
    return dict(metadata.state_dict_metadata)


def _as_os_error(error: Any) -> OSError:
    """The first process's own OSError, so that its number says what is wrong with the disk."""
    import errno

    for cause, _ in error.failures.values():
        if isinstance(cause, OSError):
            return cause
    text = _cause(error)
    number = errno.ENOSPC if "No space" in text else errno.EFBIG if "too large" in text else errno.EIO
    return OSError(number, text)


def _cause(error: Any) -> str:
    return "; ".join(f"process {rank}: {cause!r}" for rank, (cause, _) in sorted(error.failures.items()))
