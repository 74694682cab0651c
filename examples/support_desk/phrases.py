"""The words of the support desk: sixteen issues with their three right steps, and everything else an agent may say.

Each phrase is one sentence of a reply, written without its full stop. The vocabulary is closed, about 200 words.
"""

from __future__ import annotations

from typing import Final

ISSUES: Final[dict[str, tuple[str, str, str]]] = {
    "slow wifi": ("restart the router", "change wifi channel", "update router firmware"),
    "cracked screen": ("photograph the damage", "file warranty claim", "mail us the device"),
    "lost password": ("open login page", "click reset link", "choose new password"),
    "late parcel": ("check tracking number", "call the courier", "confirm delivery address"),
    "wrong invoice": ("find invoice number", "compare billed items", "request a correction"),
    "missing refund": ("check bank statement", "wait five days", "forward return receipt"),
    "dead battery": ("charge it overnight", "clean battery contacts", "replace the battery"),
    "noisy fan": ("blow out dust", "tighten fan screws", "lower fan speed"),
    "paper jam": ("open rear tray", "remove stuck paper", "run cleaning cycle"),
    "frozen app": ("force quit app", "clear app cache", "install latest version"),
    "blocked account": ("verify your email", "answer security questions", "unlock account online"),
    "double charge": ("list both payments", "dispute second charge", "watch for credit"),
    "faulty charger": ("try another socket", "inspect the cable", "order spare charger"),
    "blurry camera": ("wipe camera lens", "enable auto focus", "turn on flash"),
    "silent speaker": ("raise the volume", "pair bluetooth again", "play other song"),
    "leaking washer": ("close water valve", "tighten drain hose", "level the machine"),
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
