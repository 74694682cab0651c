"""When to add and when to remove a rollout actor: pure decisions on measured idleness, no input or output.

The learner waits for rollouts → add one; the actors have nothing to do → remove one. When both wait, what lies between
them (the reward service, the queue) is the limit, and more actors would not help. Nothing is decided on less than a
window of measurements taken since the last change, nor within the cool-down after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from configs.run import AutoscaleSection


@dataclass(frozen=True)
class Load:
    """Idle shares over the window, each in [0, 1]; None: not measured yet."""

    learner_idle: float | None
    actors_idle: float | None


@dataclass(frozen=True)
class Decision:
    """`change`: actors to add, or to remove where it is negative."""

    change: int
    reason: str


STAY = Decision(0, "")


def decide(load: Load, *, actors: int, section: AutoscaleSection) -> Decision:
    """What `actors` actors under this load call for. Never leaves [min_actors, max_actors].

    Example: learner idle 0.4, actors idle 0.1, two actors of at most eight → add one.
    """
    if actors < section.min_actors:
        return Decision(section.min_actors - actors, f"fewer than min_actors = {section.min_actors}")
    if actors > section.max_actors:
        return Decision(section.max_actors - actors, f"more than max_actors = {section.max_actors}")
    if load.learner_idle is None or load.actors_idle is None:
        return STAY
    shares = f"learner idle {load.learner_idle:.0%}, actors idle {load.actors_idle:.0%}"
    actors_wait = load.actors_idle > section.remove_above_actor_idle
    if load.learner_idle > section.add_above_learner_idle:
        if actors_wait:
            return Decision(0, f"{shares}: what lies between them is the limit")
        if actors < section.max_actors:
            return Decision(1, shares)
    elif actors_wait and actors > section.min_actors:
        return Decision(-1, shares)
    return STAY


@dataclass
class LoadWindow:
    """Measurements of the newest `window_s`, from which `load` is read. `clear` when the number of actors changes."""

    window_s: float
    _steps: deque[tuple[float, float]] = field(default_factory=deque)
    """(idle seconds, seconds) of the newest steps, enough of them to cover the window."""
    _idle: dict[str, deque[tuple[float, float]]] = field(default_factory=dict)
    """Actor → (time, its idle seconds until then)."""
    _since_s: float | None = None

    def clear(self) -> None:
        self._steps.clear()
        self._idle.clear()
        self._since_s = None

    def add_step(self, *, now_s: float, idle_s: float, step_s: float) -> None:
        """A step of the learner that has just ended. One that began before the last `clear` is left out."""
        if self._since_s is None:
            self._since_s = now_s  # What began before is not all ours.
            return
        if now_s - step_s < self._since_s - 1e-9:
            return
        self._steps.append((min(idle_s, step_s), step_s))
        while sum(seconds for _, seconds in self._steps) - self._steps[0][1] >= self.window_s:
            self._steps.popleft()

    def add_actors(self, idle_s: Mapping[str, float], *, now_s: float) -> None:
        """Each actor's idle seconds since its start. Actors that are not named any more are forgotten."""
        self._since_s = now_s if self._since_s is None else self._since_s
        self._idle = {name: self._idle.get(name, deque()) for name in idle_s}
        for name, seconds in idle_s.items():
            series = self._idle[name]
            series.append((now_s, seconds))
            while len(series) > 2 and now_s - series[1][0] >= self.window_s:
                series.popleft()

    @property
    def load(self) -> Load:
        """Shares over at least `window_s`; None for a side that has not been measured for so long."""
        return Load(self._learner_idle, self._actors_idle)

    @property
    def _learner_idle(self) -> float | None:
        seconds = sum(step_s for _, step_s in self._steps)
        if seconds < self.window_s:
            return None
        return sum(idle_s for idle_s, _ in self._steps) / seconds

    @property
    def _actors_idle(self) -> float | None:
        """The mean over actors measured for the whole window."""
        shares = []
        for series in self._idle.values():
            (first_s, first_idle_s), (last_s, last_idle_s) = series[0], series[-1]
            if last_s - first_s >= self.window_s:
                shares.append(min(1.0, max(0.0, (last_idle_s - first_idle_s) / (last_s - first_s))))
        return sum(shares) / len(shares) if shares else None


class Autoscaler:
    """`decide` over time: the window, and the cool-down after a change."""

    def __init__(self, section: AutoscaleSection) -> None:
        self.section = section
        self.window = LoadWindow(section.window_s)
        self._changed_s: float | None = None

    def changed(self, *, now_s: float) -> None:
        """The number of actors has changed, whoever did it: measure anew."""
        self._changed_s = now_s
        self.window.clear()

    def decide(self, *, actors: int, now_s: float) -> Decision:
        if self._changed_s is not None and now_s - self._changed_s < self.section.cool_down_s:
            return STAY
        return decide(self.window.load, actors=actors, section=self.section)
