"""No entropy control: the plain baseline, entropy coefficient 0."""

from __future__ import annotations

from epo.objectives.control.base import EntropyControl


class NoControl(EntropyControl):
    """Plain policy optimisation. Every hook is neutral."""
