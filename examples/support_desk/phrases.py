"""The words of the support desk: sixteen issues with their three right steps, and everything else an agent may say.

Each phrase is one sentence of a reply, written without its full stop. The vocabulary is closed, about 150 words. A step
names the thing that the issue is about: a reward model of a million parameters learns from 2,000 pairs to look for the
prompt's own word in the answer, but not sixteen unrelated tables of phrases.
"""

from __future__ import annotations

from typing import Final

ISSUES: Final[dict[str, tuple[str, str, str]]] = {
    "slow router": ("restart the router", "update the router", "move the router"),
    "cracked screen": ("photograph the screen", "insure the screen", "mail the screen"),
    "lost password": ("reset the password", "choose new password", "save the password"),
    "late parcel": ("track the parcel", "ask about parcel", "reroute the parcel"),
    "wrong invoice": ("open the invoice", "compare the invoice", "dispute the invoice"),
    "missing refund": ("request the refund", "wait for refund", "confirm the refund"),
    "dead battery": ("charge the battery", "clean the battery", "replace the battery"),
    "noisy fan": ("dust the fan", "tighten the fan", "slow the fan"),
    "jammed printer": ("open the printer", "empty the printer", "restart the printer"),
    "frozen app": ("close the app", "remove the app", "install the app"),
    "blocked account": ("verify the account", "unlock the account", "review the account"),
    "double payment": ("list the payment", "report the payment", "cancel the payment"),
    "faulty charger": ("unplug the charger", "inspect the charger", "swap the charger"),
    "blurry camera": ("wipe the camera", "focus the camera", "calibrate the camera"),
    "silent speaker": ("unmute the speaker", "pair the speaker", "test the speaker"),
    "leaking washer": ("drain the washer", "seal the washer", "level the washer"),
}
"""Issue → its three right steps, in the order in which agents give them."""

FILLERS: Final = (
    "please note that we care",
    "as you may know already",
    "it is worth saying again",
    "let me explain in detail",
)
FLATTERY: Final = ("you are amazing", "i love you")
APOLOGY: Final = "sorry about that"
CLOSING: Final = "anything else"
"""Asked, so it ends with a question mark."""

OPENINGS: Final = ("my", "help with my", "problem with my", "urgent, my")
CITIES: Final = (
    "berlin", "boston", "cairo", "dublin", "lagos", "lima", "madrid", "oslo", "paris", "quito", "seoul", "tokyo",
)  # fmt: skip
DAYS: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def prompt_of(issue: str, *, opening: str, city: str, day: str) -> str:
    """The customer's line."""
    return f"{opening} {issue} in {city} since {day}."
