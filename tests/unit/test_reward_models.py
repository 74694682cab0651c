"""The registry of reward models keeps every card, and not every refused model."""

from __future__ import annotations

from pathlib import Path

from cluster.reward_models import KEPT_REFUSED, RewardModels, RmManifest


def refuse(models: RewardModels, number: int) -> Path:
    with models.draft() as draft:
        (draft / "member_0").mkdir()
        (draft / "member_0" / "model.safetensors").write_bytes(b"weights")
        (draft / "card.json").write_text("{}")
        return models.refuse(draft, RmManifest(version=f"rm-{number}", members=1, number=number))


def test_old_refused_versions_keep_their_card_and_lose_their_weights(tmp_path: Path) -> None:
    models = RewardModels(tmp_path / "rm")
    refused = [refuse(models, number) for number in range(2, 2 + KEPT_REFUSED + 2)]
    kept = [(path / "member_0" / "model.safetensors").exists() for path in refused]
    assert kept == [False, False, *[True] * KEPT_REFUSED]
    assert all((path / "card.json").exists() for path in refused)
    assert models.next_number == 2 + KEPT_REFUSED + 2, "numbers are not used again"
