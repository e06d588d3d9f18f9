"""What holds for every program of a server."""

from dataclasses import dataclass

LAYERS = ("check", "audit", "namespaces", "chroot", "user", "seccomp", "limits")


@dataclass(frozen=True)
class Settings:
    """`seconds` of wall-clock time and bytes of `memory` for each program; layers to go `without` (tests)."""

    seconds: float
    memory: int
    without: tuple[str, ...] = ()
    call: bool = True

    def has(self, layer: str) -> bool:
        return layer not in self.without
