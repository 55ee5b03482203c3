"""Hides TRL from verl's workers: verl 0.9.1 asks an installed TRL for a class that TRL 1.16.0 does not have."""

from __future__ import annotations

import sys

sys.modules["trl"] = None  # type: ignore[assignment]
