"""The report's HTML: its style, and the pieces that its parts are built of. Every text is escaped here."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Final

from keel.display import GAP

POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE: Final = """
:root { color-scheme: light; --line: #d1d9e0; --dim: #59636e; --ok: #b4e3be; --over: #f9e2a0; --warn: #e3a008;
  --past: #ffc4bd; --act: #cf222e; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 1180px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.3rem 0 .5rem; }
.note, figcaption, .score { color: var(--dim); } figcaption { font-size: .82rem; line-height: 1.4;
  padding: .2rem .3rem; }
.score { font-size: .85rem; } .score.right { float: right; margin-left: .5rem; }
.missing, .state { border-left: 4px solid #d4a72c; background: #fff8c5; padding: .5rem .8rem; margin: .8rem 0; }
.state.ok { border-color: #1a7f37; background: #eafbee; } .state.act { border-color: var(--act); background: #fff0ee; }
.state b { font-size: 1.05rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(350px, 1fr)); gap: 1rem; }
.curves.wide { grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; } figure img { width: 100%;
  display: block; }
.headline { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.headline div { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; min-width: 8rem; }
.headline b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; } td, th { border: 1px solid var(--line); padding: .35rem .6rem;
  text-align: left; vertical-align: top; } th { background: #f6f8fa; }
td code { white-space: nowrap; }
table.narrow { width: auto; } td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; width: 33%; } td.why { overflow-wrap: anywhere; }
table.strips { font-size: .82rem; } table.strips td, table.strips th { border: 0; padding: .08rem .5rem; vertical-align:
  middle; } table.strips td.strip { width: 60%; padding: .08rem 0; } table.strips code { white-space: nowrap; }
table.strips svg { width: 100%; height: 15px; display: block; } table.strips tr.axis svg { height: 18px; }
table.strips tr.group td { color: var(--dim); padding-top: .55rem; font-weight: 600; }
.key { display: inline-block; width: .9em; height: .9em; border-radius: 2px; vertical-align: -.1em; margin-left: .9em; }
.level { border-radius: 2em; padding: .05rem .6rem; font-weight: 600; font-size: .85rem; white-space: nowrap; }
.level.ok { background: var(--ok); } .level.warn { background: var(--warn); } .level.act { background: var(--act);
  color: #fff; }
.moments { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 1rem; align-items: start; }
.moments section { border: 1px solid var(--line); border-radius: 6px; padding: .2rem .8rem .6rem; }
.moments section.alarm { border-color: var(--act); } .moments p { margin: .5rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; border-top: 1px solid #eaeef2; padding-top: .4rem; } .moments .prompt { color: var(--dim);
  font-size: .85rem; }
mark { background: #ffd33d; padding: 0 .1em; border-radius: 2px; } summary { cursor: pointer; color: #0969da; }
pre { background: #f6f8fa; border-radius: 6px; padding: .5rem .8rem; overflow-x: auto; font-size: .85rem; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole page; empty parts are left out."""
    text = "\n".join(part for part in body if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{text}\n</body></html>\n"
    )


def figure(title: str, svg_base64: str, caption: str = "") -> str:
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    image = f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{svg_base64}">'
    return f"<figure>{image}{below}</figure>"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = (), css: str = "") -> str:
    """Cells are HTML already. `numbers`: columns that are aligned as such."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{"number" if at in numbers else "why"}">{cell}</td>' for at, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )  # fmt: skip
    return f'<table class="{css}"><tr>{head}</tr>{body}</table>'


def text(value: object) -> str:
    """Any value of a record, escaped."""
    return html.escape(plain(value))


def plain(value: object) -> str:
    if value is None:
        return GAP
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def folded(summary: str, body: str) -> str:
    """Shown when it is asked for. `body` is HTML."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"
