"""When to update the reward model while the policy trains. Pure: what the run has shown so far → a reason, or none.

Reasons, each of them a key of rm.refresh: so many policy versions; KL grown by so much; reward model and judge order
too many fresh pairs differently; the reward rises no more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.run import RefreshSection


@dataclass(frozen=True)
class RefreshProgress:
    """What the reasons look at. Versions are the policy's; KL in nats per sequence."""

    version: int = 0
    kl: float = 0.0
    last_version: int = 0
    """When the last refresh began,"""
    last_kl: float = 0.0
    """and the KL then."""
    best_z: float | None = None
    """Highest mean reward since then, in standard deviations from the calibration's mean,"""
    best_version: int = 0
    """and when it was reached."""
    disagreement: float | None = None
    """Share of freshly judged pairs that reward model and judge order differently, measured since then,"""
    probed_version: int = 0
    """and when that was."""
    pairs_judged: int = 0
    """Over the whole run."""

    def observe(self, *, version: int, kl: float, z: float | None, gain: float) -> RefreshProgress:
        """A step has ended. `gain`: by how much z must rise to count. A resumed run's driver hears of all steps again:
        the reward of those before the last refresh was another model's."""
        seen = replace(self, version=version, kl=kl)
        if z is not None and version > self.last_version and (self.best_z is None or z >= self.best_z + gain):
            return replace(seen, best_z=z, best_version=version)
        return seen

    def not_ahead_of(self, version: int) -> RefreshProgress:
        """The newest version is this one: a run that was resumed, or a learner that was, goes on from a checkpoint that
        may be older than the last refresh."""
        return replace(
            self,
            last_version=min(self.last_version, version),
            best_version=min(self.best_version, version),
            probed_version=min(self.probed_version, version),
        )

    def probing(self) -> RefreshProgress:
        """Reward model and judge are being compared."""
        return replace(self, probed_version=self.version)

    def judged(self, pairs: int) -> RefreshProgress:
        """`pairs` more were judged."""
        return replace(self, pairs_judged=self.pairs_judged + pairs)

    def begun(self) -> RefreshProgress:
        """A refresh begins: what the reasons count, they count from here."""
        return replace(
            self,
            last_version=self.version,
            last_kl=self.kl,
            best_z=None,
            best_version=self.version,
            disagreement=None,
            probed_version=self.version,
        )


def refresh_reason(progress: RefreshProgress, section: RefreshSection) -> str | None:
    """Why a refresh is due, for people; None when none is.

    >>> refresh_reason(RefreshProgress(version=8), RefreshSection())
    '8 policy versions since the last one (every_versions 8)'
    """
    if not may_refresh(progress, section):
        return None
    versions, grown = progress.version - progress.last_version, progress.kl - progress.last_kl
    if section.every_versions is not None and versions >= section.every_versions:
        return f"{versions} policy versions since the last one (every_versions {section.every_versions})"
    limit = section.kl_over_nats_per_sequence
    if limit is not None and grown > limit:
        return f"KL grew by {grown:.2f} nats per sequence since the last one (kl_over_nats_per_sequence {limit:g})"
    share, over = progress.disagreement, section.disagreement_over
    if share is not None and over is not None and share > over:
        return f"reward model and judge order {share:.0%} of fresh pairs differently (disagreement_over {over:g})"
    still = progress.version - progress.best_version
    if section.plateau_versions is not None and progress.best_z is not None and still >= section.plateau_versions:
        return f"the reward has not risen for {still} policy versions (plateau_versions {section.plateau_versions})"
    return None


def probe_due(progress: RefreshProgress, section: RefreshSection) -> bool:
    """Reward model and judge are to be compared now."""
    return (
        section.disagreement_over is not None
        and may_refresh(progress, section)
        and progress.version - progress.probed_version >= section.probe_every_versions
    )


def may_refresh(progress: RefreshProgress, section: RefreshSection) -> bool:
    """The section allows one at this version, and there is budget left."""
    return not _frozen(progress, section) and progress.pairs_judged < section.budget_pairs


def _frozen(progress: RefreshProgress, section: RefreshSection) -> bool:
    after = section.freeze_after_version
    return progress.version < max(1, section.freeze_before_version) or (after is not None and progress.version > after)
