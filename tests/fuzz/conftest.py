"""Made-up run folders come from the tests of reports."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "reporting"))
