"""What a run takes of its machine, step by step: memory, and the environment workers that had to be replaced."""

from __future__ import annotations

from collections import Counter

from epo.environments._processes import resident_bytes
from epo.environments.pool import EnvPool

_MB = 2**20  # as in environment.worker_memory_mb


class MachineWatch:
    """Metrics of the process that trains and of the workers of its pool. A look takes milliseconds."""

    def __init__(self, pool: EnvPool) -> None:
        self._pool = pool
        self._replaced: Counter[str] = Counter()

    def metrics(self) -> dict[str, float]:
        """`memory/*` in MB at this moment, absent where there is no /proc, and `workers/<cause>`: how many were
        replaced since the last call, at the first since the pool was made."""
        stats = self._pool.stats()
        replaced = Counter({**stats.restarts, "grown": stats.recycled})
        metrics = {f"workers/{cause}": float(count - self._replaced[cause]) for cause, count in replaced.items()}
        self._replaced = replaced
        learner = resident_bytes()
        if learner is not None and stats.rss_bytes is not None:
            metrics |= {"memory/learner_mb": learner / _MB, "memory/workers_mb": sum(stats.rss_bytes) / _MB}
        return metrics
