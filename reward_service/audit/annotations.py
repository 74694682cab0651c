"""Who judged what: preferences read from any form with their votes, and annotators kept out of training by id.

Pure: no ray, no queue, no torch. The forms of input are in cluster/judgements.py, merging into pairs in
cluster/preference_table.py, labels from votes in cluster/labels.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster.labels import MIN_CONFIDENCE, Split, held_out_annotators, without_annotators
from cluster.preference_table import LoadedPreferences, Problem, Vote, read_preferences
from cluster.ratings import Rating
from configs.run import FileSource

__all__ = [
    "LoadedPreferences", "Problem", "Rating", "Split", "Vote", "held_out_annotators", "load_preferences",
    "without_annotators",
]  # fmt: skip


def load_preferences(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    min_confidence: float = MIN_CONFIDENCE,
    min_votes: int = 1,
    held_out_annotators: float = 0.0,
    seed: int = 0,
) -> LoadedPreferences:
    """Preferences of a file of JSON Lines (also .gz) or Parquet, in any of the forms of cluster/judgements.py.

    A malformed record is a Problem with its line, not the end. `held_out_annotators`: this share of annotators, by id,
    makes no labels. Raises DataError for a file that is missing or damaged, and for one without a usable pair, with its
    first problems.
    """
    return read_preferences(
        FileSource(path=path, columns=dict(columns or {}), limit=limit),
        min_confidence=min_confidence,
        min_votes=min_votes,
        held_out_annotators=held_out_annotators,
        seed=seed,
    )
