"""The base of Keel's error tree and its first branch. The whole tree, and where to import it from: cluster/errors.py.

They stand here because configs is the lowest package: it raises ConfigError and may import nothing of Keel's.
"""

from __future__ import annotations


class KeelError(Exception):
    """Base of the tree. `what` failed, what was `got`, what the reader can `do` about it."""

    def __init__(self, what: str, got: str = "", do: str = "") -> None:
        super().__init__(what, got, do)
        self.what, self.got, self.do = what, got, do

    def __str__(self) -> str:
        parts = [self.what]
        if self.got:
            parts.append(f"got: {self.got}")
        if self.do:
            parts.append(f"do: {self.do}")
        return "\n  ".join(parts)


class ConfigError(KeelError):
    """The configuration is wrong or contradicts itself."""
