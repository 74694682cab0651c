"""Several Ray nodes in one place, with Ray's own test cluster: for what needs no root, and no network of its own.

A process of its own holds the cluster, as Ray reads its environment once. It is told by lines: `join`, `lose N`.
Produces: an address for `ray.address`. Waits for: each answer, with a deadline. Who unblocks it: the process.
Always holds: with the `with` block the process ends, and its nodes with it.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from keel.ray_environment import NODE_ENVIRONMENT

_ANSWER_S = 120.0
_END_S = 60.0


@dataclass
class Raylets:
    """A cluster of `count` nodes; node 0 is the head, where the driver belongs."""

    count: int
    cpus: int = 1
    head_cpus: int = 3
    address: str = ""

    def __enter__(self) -> Self:
        # Ray notes the newest cluster's address in its directory: not in the one that others here read.
        self._directory = Path(tempfile.mkdtemp(prefix="keelraylets-", dir="/tmp"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.multinode.raylets", str(self.head_cpus), str(self.cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self.environment,
            start_new_session=True,
        )
        try:
            self.address = self._answer()
            for _ in range(self.count - 1):
                self.join()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        finally:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """For drivers too."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        own = {"RAY_TMPDIR": str(self._directory), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        return kept | NODE_ENVIRONMENT | own

    def join(self) -> None:
        """One more node."""
        self._tell("join")

    def lose(self, number: int) -> None:
        """Kill a node's raylet, and with it all its workers, without a word to the others."""
        self._tell(f"lose {number}")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _ANSWER_S)
        line = self._process.stdout.readline().strip() if ready else ""
        if not line:
            raise RuntimeError(f"the Ray test cluster did not answer, exit status {self._process.poll()}")
        return line


def _serve(head_cpus: int, cpus: int) -> None:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": head_cpus, "gcs_server_port": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.head_node]
    answer = str(cluster.address)
    try:
        print(answer, flush=True)
        for line in sys.stdin:
            verb, *number = line.split()
            if verb == "join":
                nodes.append(cluster.add_node(num_cpus=cpus))
            else:
                cluster.remove_node(nodes[int(number[0])], allow_graceful=False)
            print("done", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
