"""`keel card`: the version that scores, one by name, refused ones, and what it says where there is none."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cluster.data_records import PreferencePair
from cluster.errors import DataError, ModelError
from cluster.reward_models import RewardModels, RmManifest
from keel.card_command import show_card
from reward_service.card.card import validate_rm, write_card
from reward_service.card.records import CardInputs, Scored, ScoredPair

PAIR = PreferencePair(pair_id="1", prompt="why?", chosen="because", rejected="no")


def scored(answer: str, score: float) -> Scored:
    return Scored(prompt="why?", answer=answer, members=(score,), score=score, tokens=3, source="held_out")


def store(run_dir: Path, version: str, *, number: int, share: float, accept: bool = True, card: bool = True) -> None:
    """A version with a card, of members without weights."""
    models = RewardModels(run_dir / "rm")
    with models.draft() as draft:
        (draft / "member_0").mkdir()
        margins = [1.1 if index < 400 * share else -1.1 for index in range(400)]
        pairs = [ScoredPair(PAIR, scored(PAIR.chosen, margin), scored(PAIR.rejected, 0.0)) for margin in margins]
        made = validate_rm(CardInputs(version=version, min_accuracy=0.6, held_out=pairs, number=number))
        if card:
            write_card(made, draft)
        manifest = RmManifest(version=version, members=1, number=number, verdict=made.verdict, reason="trained [bold]")
        if accept:
            models.publish(draft, manifest)
        else:
            models.refuse(draft, manifest)


def shown(run_dir: Path, version: str | None = None, *, terminal: bool = False) -> str:
    stream = io.StringIO()
    show_card(run_dir, version=version, console=Console(file=stream, width=160, force_terminal=terminal, no_color=True))
    return stream.getvalue()


def test_the_version_that_scores_is_shown_with_all_there_are(tmp_path: Path) -> None:
    store(tmp_path, "rm-aaaa", number=1, share=0.76)
    store(tmp_path, "rm-abbb", number=2, share=0.75)
    store(tmp_path, "rm-cccc", number=3, share=0.5, accept=False)
    text = shown(tmp_path)
    assert text.startswith("# Reward model rm-abbb: green")
    listed = [line.split()[:4] for line in text.splitlines() if "trained [bold]" in line]
    assert listed == [
        ["1", "rm-aaaa", "green", "superseded"],
        ["2", "rm-abbb", "green", "scores"],
        ["3", "rm-cccc", "red", "refused"],
    ]
    assert str(tmp_path / "rm" / "versions" / "rm-abbb" / "card.html") in text.replace("\n", "")


def test_a_version_by_name_or_by_how_it_begins(tmp_path: Path) -> None:
    store(tmp_path, "rm-aaaa", number=1, share=0.76)
    store(tmp_path, "rm-abbb", number=2, share=0.75)
    store(tmp_path, "rm-cccc", number=3, share=0.5, accept=False)
    assert "# Reward model rm-aaaa: green" in shown(tmp_path, "rm-aa")
    assert "# Reward model rm-cccc: red" in shown(tmp_path, "rm-c")
    with pytest.raises(DataError, match="more than one"):
        shown(tmp_path, "rm-a")
    with pytest.raises(DataError, match="no such version"):
        shown(tmp_path, "rm-x")


def test_where_all_were_refused_the_newest_is_shown(tmp_path: Path) -> None:
    store(tmp_path, "rm-1", number=1, share=0.4, accept=False)
    store(tmp_path, "rm-2", number=2, share=0.5, accept=False)
    text = shown(tmp_path)
    assert "# Reward model rm-2: red" in text
    assert "a policy would learn its mistakes" in text


def test_weights_refused_once_and_accepted_later_are_one_version(tmp_path: Path) -> None:
    store(tmp_path, "rm-1", number=1, share=0.5, accept=False)
    store(tmp_path, "rm-1", number=2, share=0.75)
    assert "versions/rm-1/card.html" in shown(tmp_path, "rm-1").replace("\n", "")


def test_a_terminal_gets_it_laid_out(tmp_path: Path) -> None:
    store(tmp_path, "rm-1", number=1, share=0.76)
    text = shown(tmp_path, terminal=True)
    assert "Reward model rm-1: green" in text
    assert "|---|" not in text


def test_no_model_and_no_card_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="keel rm CONFIG"):
        shown(tmp_path)
    store(tmp_path, "rm-1", number=1, share=0.76, card=False)
    with pytest.raises(DataError, match="no validation card"):
        shown(tmp_path)
