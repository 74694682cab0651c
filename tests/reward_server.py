"""A reward server on a real socket that does as told: answers, or fails in the ways servers fail."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """In place of the rewards."""

    status: int = 200
    body: bytes = b""


@dataclass
class RewardServer:
    """`replies`: given first, one a request."""

    reward: Callable[[str, str], object]
    url: str = ""
    replies: deque[Reply] = field(default_factory=deque)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    end: threading.Event = field(default_factory=threading.Event)
    """Requests that hang end with it."""
    hangs: threading.Event = field(default_factory=threading.Event)
    """A request does."""

    def answer(self, body: dict[str, Any]) -> Reply:
        """Status 500 where the reward function raises; never, before `end`, for the answer "hang"."""
        if self.replies:
            return self.replies.popleft()
        texts = [(prompt, query[len(prompt) :]) for prompt, query in zip(body["prompts"], body["query"], strict=True)]
        if any(answer == "hang" for _, answer in texts):
            self.hangs.set()
            self.end.wait(20.0)
        try:
            return Reply(body=json.dumps({"rewards": [self.reward(*text) for text in texts]}).encode())
        except (KeyError, ValueError):
            return Reply(500, b"internal error")


@contextlib.contextmanager
def reward_server(reward: Callable[[str, str], object]) -> Iterator[RewardServer]:
    """Serves on a free port until the block ends."""
    told = RewardServer(reward)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.bodies.append(body)
            told.authorizations.append(self.headers["Authorization"])
            reply = told.answer(body)
            with contextlib.suppress(OSError):  # the client may have given up
                self.send_response(reply.status)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    told.url = f"http://127.0.0.1:{server.server_address[1]}/get_reward"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        told.end.set()
        server.shutdown()
        thread.join()
        server.server_close()
