"""Several hosts on one machine: network namespaces that are joined by a switch, each with an address and a Ray node of
its own. The file system is one, as shared storage is on a cluster.

Consumes: root, and `ip` of iproute2. Produces: a Ray cluster on 10.77.0.0/24 that nothing outside can reach, and that
reaches nothing outside: the switch is a namespace too, and forwards to nobody.
Waits for: each `ray start` and each process's end, with a deadline. Who unblocks it: they, or the deadline.
Always holds: after the `with` block no process, namespace or link of it is left. `lose` takes a host away as a power
cut does: the link goes first, so no connection is closed in good order; then every process is killed. `cut` takes only
the network; `mend` gives it back, with processes that do not know that they were given up.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from keel.ray_environment import NODE_ENVIRONMENT

_IP: Final = shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
_RAY: Final = str(Path(sys.executable).parent / "ray")
_SUBNET: Final = "10.77.0"
_SWITCH_ADDRESS: Final = f"{_SUBNET}.254"
_GCS_PORT: Final = 6400
_OBJECT_STORE_BYTES: Final = 150_000_000
_BOOT_TIMEOUT_S: Final = 120.0
_END_TIMEOUT_S: Final = 20.0


def why_no_hosts() -> str | None:
    """What is missing on this machine, or None. Tries it: a container's root may not be allowed to."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if _IP is None:
        return "network namespaces need the `ip` command of iproute2"
    name = f"keel-try-{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1")
    except subprocess.CalledProcessError as error:
        return f"this machine does not allow network namespaces: {error.stderr.strip()}"
    finally:
        subprocess.run([_IP, "netns", "del", name], capture_output=True, check=False)
    return None


def ip_command() -> str:
    """The path of `ip`."""
    return str(_IP)


@dataclass
class Host:
    """One namespace. `log` holds what its `ray start` printed."""

    number: int
    namespace: str
    address: str
    temp_dir: Path
    log: Path
    alive: bool = True


@dataclass
class Hosts:
    """A cluster. Host 0 is the head; jobs run there, as `ray.address=auto` finds it by RAY_ADDRESS."""

    directory: Path
    name: str
    cpus: int
    environment: Mapping[str, str]
    all: list[Host] = field(default_factory=list)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @classmethod
    @contextmanager
    def start(
        cls, count: int, *, cpus: int = 4, head_cpus: int | None = None, environment: Mapping[str, str] | None = None
    ) -> Iterator[Hosts]:
        """`count` hosts with `cpus` logical CPUs each (the head: `head_cpus`), up and joined. Raises RuntimeError with
        the log of a Ray that did not come up."""
        # Ray's sockets live in its directory, and a socket's path has 107 characters at most.
        directory = Path(tempfile.mkdtemp(prefix="keelhosts-", dir="/tmp"))
        hosts = cls(directory, f"keel-{secrets.token_hex(3)}", cpus, dict(environment or {}))
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            stack.callback(hosts._remove)
            hosts._add_switch()
            hosts._boot(hosts._add_host(), cpus=head_cpus if head_cpus is not None else cpus)()
            for wait in [hosts._boot(hosts._add_host()) for _ in range(count - 1)]:
                wait()
            yield hosts

    @property
    def ray_address(self) -> str:
        return f"{_SUBNET}.1:{_GCS_PORT}"

    def run(self, number: int, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command inside a host; its output in one pipe unless `options` say otherwise."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
        process = subprocess.Popen(
            [str(_IP), "netns", "exec", self.all[number].namespace, *command],
            text=True,
            env=self._environment(),
            start_new_session=True,
            **options,
        )
        self.started.append(process)
        return process

    def output(self, number: int, command: Sequence[str], *, timeout_s: float = 60.0) -> str:
        """What a short command prints inside a host. Raises CalledProcessError and TimeoutExpired."""
        process = self.run(number, command, stderr=subprocess.PIPE)
        out, errors = process.communicate(timeout=timeout_s)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, list(command), out, errors)
        return out

    def http(self, number: int, url: str) -> str:
        """The body of a GET from inside a host. Raises CalledProcessError where nothing answers in time."""
        program = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode())"
        return self.output(number, [sys.executable, "-c", program, url])

    def join(self, *, without: Path | None = None) -> Host:
        """One more host, joined to the cluster; it may lack a part of the shared file system."""
        host = self._add_host()
        self._boot(host, without=without)()
        return host

    def cut(self, number: int) -> None:
        """Unplug the network. Everything on the host runs on."""
        _ip("-n", f"{self.name}-sw", "link", "set", f"port{number}", "down")

    def mend(self, number: int) -> None:
        """Plug it in again."""
        _ip("-n", f"{self.name}-sw", "link", "set", f"port{number}", "up")

    def lose(self, number: int) -> None:
        """A power cut."""
        self.all[number].alive = False
        self.cut(number)
        self._kill_all(self.all[number])

    def pids(self, number: int) -> list[int]:
        """Processes of a host."""
        listed = subprocess.run(
            [str(_IP), "netns", "pids", self.all[number].namespace], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in listed.stdout.split()]

    # ---------------------------------------------------------------- network

    def _add_switch(self) -> None:
        switch = f"{self.name}-sw"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "addr", "add", f"{_SWITCH_ADDRESS}/24", "dev", "bridge0")
        _ip("-n", switch, "link", "set", "bridge0", "up")

    def _add_host(self) -> Host:
        number = len(self.all)
        namespace, port = f"{self.name}-h{number}", f"port{number}"
        temp_dir = self.directory / f"h{number}"
        temp_dir.mkdir()
        host = Host(number, namespace, f"{_SUBNET}.{number + 1}", temp_dir, self.directory / f"h{number}.log")
        _ip("netns", "add", namespace)
        self.all.append(host)
        _ip("-n", f"{self.name}-sw", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", f"{self.name}-sw", "link", "set", port, "master", "bridge0", "up")
        for device in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", device, "up")
        _ip("-n", namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        # As on a real host. It leads to the switch, which forwards nothing.
        _ip("-n", namespace, "route", "add", "default", "via", _SWITCH_ADDRESS)
        return host

    # ---------------------------------------------------------------- Ray

    def _boot(self, host: Host, *, cpus: int | None = None, without: Path | None = None) -> Callable[[], None]:
        """Begin `ray start`, a child of this process; the returned function waits until it is up."""
        head = ["--head", "--port", str(_GCS_PORT), "--include-dashboard", "false"]
        command = [
            _RAY, "start", *(head if host.number == 0 else ["--address", self.ray_address]),
            "--node-ip-address", host.address, "--temp-dir", str(host.temp_dir),
            "--num-cpus", str(self.cpus if cpus is None else cpus), "--num-gpus", "0",
            "--object-store-memory", str(_OBJECT_STORE_BYTES),
            "--disable-usage-stats", "--include-log-monitor", "false", "--block",
        ]  # fmt: skip
        if without is not None:
            hide = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", hide, str(without), *command]
        with host.log.open("w") as log:
            process = self.run(host.number, command, stdout=log, stderr=subprocess.STDOUT)

        def wait() -> None:
            deadline = time.monotonic() + _BOOT_TIMEOUT_S
            while "Ray runtime started" not in host.log.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"Ray did not come up on host {host.number}: {host.log.read_text()}")
                time.sleep(0.1)

        return wait

    def _environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        threads = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        return kept | NODE_ENVIRONMENT | threads | {"RAY_ADDRESS": self.ray_address} | dict(self.environment)

    # ---------------------------------------------------------------- the end

    def _remove(self) -> None:
        for host in self.all:
            self._kill_all(host)
        for process in self.started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_TIMEOUT_S)
            if process.stdout is not None:
                process.stdout.close()
        for namespace in [f"{self.name}-sw", *(host.namespace for host in self.all)]:
            subprocess.run([str(_IP), "netns", "del", namespace], capture_output=True, check=False)

    def _kill_all(self, host: Host) -> None:
        deadline = time.monotonic() + _END_TIMEOUT_S
        while pids := self.pids(host.number):
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {pids} of host {host.number} do not end")
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def _ip(*arguments: str) -> None:
    subprocess.run([str(_IP), *arguments], capture_output=True, text=True, check=True, timeout=20)
