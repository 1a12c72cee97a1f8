"""What came of a build, target by target."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import EXIT_OK


@dataclass(frozen=True)
class TargetResult:
    """The outcome for one target: "built", "unchanged" or "failed" with a reason."""

    target: str
    status: str
    folder: Path
    seconds: float
    reason: str = ""
    exit_code: int = EXIT_OK

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**vars(self), "folder": str(self.folder), "seconds": round(self.seconds, 2)}


@dataclass(frozen=True)
class BuildReport:
    """The results in the order of the targets."""

    results: list[TargetResult] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if every target was built or unchanged, else the code of the first failure."""
        codes: list[int] = [result.exit_code for result in self.results if result.status == "failed"]
        return codes[0] if codes else EXIT_OK
