"""`keel top RUN`: a live view of a run, from its files alone; so it works on any machine that sees the run directory.

Ends by itself when the run is finished or halted; Ctrl-C ends the view and leaves the run alone. Where the output is no
terminal, one frame is printed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from keel.top_frame import frame
from keel.top_view import TopView

if TYPE_CHECKING:
    from rich.console import Console

_EVERY_S: Final = 1.0


def top(
    run_dir: Path,
    *,
    once: bool = False,
    every_s: float = _EVERY_S,
    console: Console | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the run until it ends or Ctrl-C; `once`, or without a terminal, one frame."""
    from rich.console import Console as RichConsole
    from rich.live import Live

    if console is None:
        _never_fail_on_a_letter(sys.stdout)
        console = RichConsole()
    plain = not console.encoding.startswith("utf")
    view = TopView(run_dir)
    view.read()
    if once or not console.is_terminal:
        console.print(frame(view, now_s=clock(), width=console.width, height=None, plain=plain))
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                size = console.size
                now_s = clock()
                live.update(frame(view, now_s=now_s, width=size.width, height=size.height, plain=plain), refresh=True)
                if view.over(now_s):
                    break
                sleep(every_s)
                view.read()
    except KeyboardInterrupt:
        pass
    # The alternate screen is gone by now; what was last seen stays.
    console.print(frame(view, now_s=clock(), width=console.width, height=None, plain=plain))


def _never_fail_on_a_letter(stream: TextIO) -> None:
    """A terminal without UTF-8 gets question marks, not an error."""
    import io

    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
