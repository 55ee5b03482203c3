"""EPO inside TRL: `trl.GRPOTrainer` and `trl.GRPOConfig` with an entropy term of ours in the loss (docs/trl.md).

Example::

    from epo.integrations.trl import EPOConfig, EPOTrainer
"""

from __future__ import annotations

from epo.integrations.trl.config import EPOConfig
from epo.integrations.trl.trainer import EPOTrainer

__all__ = ["EPOConfig", "EPOTrainer"]
