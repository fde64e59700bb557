"""What `tkit doctor` says about a machine."""

from __future__ import annotations

from dataclasses import dataclass

DIAGNOSIS_SCHEMA = "tkit.diagnosis/1"
ASKABLE = ("plan", "build", "validate", "serve", "sweep", "report")  # commands that doctor can be asked about


@dataclass(frozen=True, kw_only=True)
class Check:
    """`status` is "ok", "warn" (works, but) or "fail" (what was asked for needs it). `fix` is set unless ok."""

    name: str
    status: str
    found: str
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    schema: str = DIAGNOSIS_SCHEMA
    command: str
    backend: str
    checks: tuple[Check, ...]

    @property
    def is_able(self) -> bool:
        return all(check.status != "fail" for check in self.checks)
