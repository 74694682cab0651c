"""`keel card RUN`: the validation card of a reward model version, in the terminal, and where its page lies."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from cluster.errors import DataError, ModelError
from cluster.reward_models import MANIFEST, RewardModels, RmManifest, read_manifest
from reward_service.card.records import CARD_HTML
from reward_service.card.render import markdown, read_card


def show_card(run_dir: Path, *, version: str | None = None, console: Console | None = None) -> None:
    """Print the card of `version` (or of what it alone begins with), else of the version that scores, else of the
    newest that was refused; then all versions there are. Refused ones have cards too.

    Raises ModelError for no reward model, DataError for no such version, or one without a card.
    """
    console = console or Console()
    known = _known(run_dir / "rm")
    directory = _chosen(run_dir / "rm", known, version=version)
    text = markdown(read_card(directory))
    if console.is_terminal:
        console.print(Markdown(text))
    else:  # piped: as it is, so that it can be read on as Markdown
        console.print(text, markup=False, highlight=False, soft_wrap=True, end="")
    current = _current(run_dir / "rm")
    console.print()
    for path, manifest in known.items():
        state = "scores now" if path.name == current else "refused" if path.parent.name == "refused" else "superseded"
        line = f"{manifest.number:>3}  {manifest.version}  {manifest.verdict or '?':<6} {state:<10}  {manifest.reason}"
        console.print(escape(line), highlight=False, soft_wrap=True)
    page = directory / CARD_HTML
    if page.is_file():
        console.print(f"\nThe whole card, with figures: {escape(str(page))}", highlight=False, soft_wrap=True)


def _known(rm_dir: Path) -> dict[Path, RmManifest]:
    """Directory → manifest of every version, refused ones too, oldest first."""
    found = {path.parent: read_manifest(path.parent) for path in rm_dir.glob(f"*/*/{MANIFEST}")}
    return dict(sorted(found.items(), key=lambda item: item[1].number))


def _current(rm_dir: Path) -> str | None:
    models = RewardModels(rm_dir)
    return models.current().version if models.exists() else None


def _chosen(rm_dir: Path, known: dict[Path, RmManifest], *, version: str | None) -> Path:
    if not known:
        raise ModelError("no reward model", got=f"nothing in {rm_dir}", do="run the rm stage: keel rm CONFIG")
    wanted = version or _current(rm_dir)
    if wanted is None:
        return list(known)[-1]
    matching = [path for path in known if path.name.startswith(wanted)]
    names = {path.name for path in matching}
    if wanted not in names and len(names) != 1:
        raise DataError(
            "more than one version begins like this" if names else "no such version",
            got=f"{wanted!r}; there are {', '.join(path.name for path in known)}",
            do="give one of them: keel card RUN --version VERSION",
        )
    name = wanted if wanted in names else names.pop()
    # Refused once and accepted later, the same weights lie in both places.
    return max((path for path in matching if path.name == name), key=lambda path: path.parent.name == "versions")
