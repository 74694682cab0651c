"""Functions run as the ranks of a real gloo group, each in a process of its own.

The processes come from a fork server that has already imported torch and the learner, so a group starts in a second.
"""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from learner.ranks import SOLO, GroupRanks, Ranks

CPU = torch.device("cpu")
DEADLINE_S = 100.0

RankFunction = Callable[..., Any]
"""(ranks, *args) → anything that travels through a pipe: plain numbers, NumPy arrays, dictionaries of them."""


class RankGroup:
    """Processes of one group, started; `results` waits for what each returned."""

    def __init__(self, function: RankFunction, *args: Any, size: int, timeout_s: float = 60.0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.learner_support", "tests.ranks_support"])
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_main, args=(function, args, rank, size, port, timeout_s, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def result(self, rank: int) -> Any:
        """What this rank's function returned; its error if it raised one, None if it died."""
        assert self._pipes[rank].poll(DEADLINE_S), f"rank {rank} neither returned nor ended"
        try:
            return self._pipes[rank].recv()
        except EOFError:
            return None

    def results(self) -> list[Any]:
        """Every rank's."""
        return [self.result(rank) for rank in range(len(self.processes))]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(10.0)


def on_ranks(function: RankFunction, *args: Any, size: int) -> list[Any]:
    """What `function(ranks, *args)` returned on each of `size` ranks. Raises the first rank's error."""
    group = RankGroup(function, *args, size=size)
    try:
        results = group.results()
    finally:
        group.kill()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def alone(function: RankFunction, *args: Any) -> Any:
    """The same with one rank, here: models whole, no group."""
    return function(SOLO, *args)


def _main(
    function: RankFunction, args: tuple[Any, ...], rank: int, size: int, port: int, timeout_s: float, pipe: Connection
) -> None:
    torch.set_num_threads(1)
    try:
        store = TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
        ranks: Ranks = GroupRanks(store, rank=rank, size=size, device=CPU, timeout_s=timeout_s)
        try:
            pipe.send(function(ranks, *args))
        finally:
            ranks.close()
    except Exception as error:
        error.add_note(traceback.format_exc())
        pipe.send(error)
