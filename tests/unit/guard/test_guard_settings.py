"""What the guard's section accepts, and what it refuses with a reason."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from configs.guard import Above, Below, GuardAction, GuardSection, Thresholds
from learner.guard.verdict import over_threshold


def refused(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        GuardSection(**fields)
    return str(caught.value)


def test_thresholds_that_lie_the_wrong_way_round() -> None:
    for section, low, high in ((Above, 2.0, 1.0), (Below, 1.0, 2.0)):
        with pytest.raises(ValidationError, match="must not lie"):
            section(warn=low, act=high)
        assert section(warn=high, act=low).warn == high
        assert section(warn=1.0, act=1.0).act == 1.0


@pytest.mark.parametrize("name", Thresholds.model_fields)
def test_every_default_can_be_passed_and_is_not_passed_at_the_start(name: str) -> None:
    """A policy that is still the reference has a ratio of 1, a share or a distance of 0, half of the wins."""
    limits = getattr(Thresholds(), name)
    assert limits.warn is not None
    section = GuardSection()
    worst = 1e9 if isinstance(limits, Above) else -1e9
    start = 1.0 if isinstance(limits, Below) or name.endswith("_ratio") else 0.0
    assert over_threshold({name: worst}, section=section) == (name,)
    assert over_threshold({name: start}, section=section) == ()


@pytest.mark.parametrize(
    ("actions", "reason"),
    [
        (("alert", "alert"), "at most once"),
        (("halt", "roll_back"), "halt ends the run"),
        (("freeze_rm", "refresh_rm"), "choose one"),
        (("explode",), "actions.0"),
    ],
)
def test_actions_that_do_not_go_together(actions: tuple[str, ...], reason: str) -> None:
    assert reason in refused(actions=actions)


@pytest.mark.parametrize("action", get_args(GuardAction))
def test_each_action_alone_and_none(action: GuardAction) -> None:
    assert GuardSection(actions=(action,)).actions == (action,)
    assert GuardSection(actions=()).actions == ()


@pytest.mark.parametrize("url", ["hooks.example.org/x", "ftp://host/x", "http://", "http://[bad", "", "https:///x"])
def test_a_webhook_needs_a_web_address(url: str) -> None:
    assert "write http" in refused(webhook=url)


def test_a_webhook_is_taken_as_it_is() -> None:
    url = "https://user:word@hooks.example.org:8443/a/b?c=d"
    assert GuardSection(webhook=url).webhook == url
