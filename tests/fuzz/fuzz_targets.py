"""What is fuzzed: importing the file of a subject adds its targets."""

from __future__ import annotations

import fuzz_checkpoints  # noqa: F401
import fuzz_configurations  # noqa: F401
import fuzz_environments  # noqa: F401
import fuzz_models  # noqa: F401
import fuzz_replies  # noqa: F401
import fuzz_runs  # noqa: F401
from fuzz_target import TARGETS, Target, throw_case

__all__ = ["TARGETS", "Target", "throw_case"]
