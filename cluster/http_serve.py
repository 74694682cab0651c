"""A small HTTP server for GETs, in a thread: metrics, health and service discovery.

Consumes: GET requests. Produces: what the route's function returns. Waits for: connections. Who unblocks it: clients,
or `close`. Always holds: routes run in the server's threads, so they only read what is safe to read from any thread; a
client that is slow or goes away holds up no other.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self

from cluster.errors import ConfigError

_LOG = logging.getLogger(__name__)
_CLIENT_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True)
class Page:
    """One answer."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200


Routes = Mapping[str, Callable[[], Page]]


class HttpServer:
    """Serves `routes` on `host`:`port` from construction to `close`; port 0 takes a free one. Raises ConfigError where
    the address cannot be bound."""

    def __init__(self, routes: Routes, *, host: str, port: int = 0) -> None:
        self._server = _bind(host, port, handler=_handler_for(routes))
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="keel-http", daemon=True
        )
        self._thread.start()
        bound_port = int(self._server.server_address[1])
        self.address: Final = f"[{host}]:{bound_port}" if ":" in host else f"{host}:{bound_port}"
        """ "host:port" as others reach it."""

    def close(self) -> None:
        """Stop serving and free the port. Repeatable."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bind(host: str, port: int, *, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hung up is no news; the default prints a traceback to stderr."""
            _LOG.debug("request from %s failed", client_address, exc_info=True)

    try:
        return Server((host, port), handler)
    except OSError as error:
        raise ConfigError(
            "cannot serve HTTP on this address",
            got=f"{host}:{port}: {error}",
            do="give an address of this machine and a free port (0 takes any)",
        ) from error


def _handler_for(routes: Routes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _CLIENT_TIMEOUT_S
        server_version = "keel"
        sys_version = ""

        def do_GET(self) -> None:
            route = routes.get(self.path.split("?", 1)[0])
            page = self._answer(route) if route else Page(b"not found\n", status=404)
            self.send_response(page.status)
            self.send_header("Content-Type", page.content_type)
            self.send_header("Content-Length", str(len(page.body)))
            self.end_headers()
            self.wfile.write(page.body)

        def _answer(self, route: Callable[[], Page]) -> Page:
            try:
                return route()
            except Exception:
                _LOG.exception("route %s failed", self.path)
                return Page(b"internal error\n", status=500)

        def log_message(self, format: str, *args: Any) -> None:
            """Scrapes come every few seconds: silence."""

    return Handler
