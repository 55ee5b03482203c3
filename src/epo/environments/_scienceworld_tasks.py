"""ScienceWorld's task types and official splits, so that tasks can be listed without a simulator."""

from __future__ import annotations

NUM_VARIATIONS: dict[str, int] = {
    "boil": 30,
    "change-the-state-of-matter-of": 30,
    "chemistry-mix": 32,
    "chemistry-mix-paint-secondary-color": 36,
    "chemistry-mix-paint-tertiary-color": 36,
    "find-animal": 300,
    "find-living-thing": 300,
    "find-non-living-thing": 300,
    "find-plant": 300,
    "freeze": 30,
    "grow-fruit": 126,
    "grow-plant": 126,
    "identify-life-stages-1": 14,
    "identify-life-stages-2": 10,
    "inclined-plane-determine-angle": 168,
    "inclined-plane-friction-named-surfaces": 1386,
    "inclined-plane-friction-unnamed-surfaces": 162,
    "lifespan-longest-lived": 125,
    "lifespan-longest-lived-then-shortest-lived": 125,
    "lifespan-shortest-lived": 125,
    "measure-melting-point-known-substance": 436,
    "measure-melting-point-unknown-substance": 300,
    "melt": 30,
    "mendelian-genetics-known-plant": 120,
    "mendelian-genetics-unknown-plant": 480,
    "power-component": 20,
    "power-component-renewable-vs-nonrenewable-energy": 20,
    "test-conductivity": 900,
    "test-conductivity-of-unknown-substances": 600,
    "use-thermometer": 540,
}
"""Task types of scienceworld 1.2.3 in the simulator's (alphabetical) order, with their numbers of variations."""


def variations(task_name: str, split: str) -> range:
    """The variations of one task type in one split, as the simulator divides them.

    With q = a quarter of the variations, rounded down: `train` = [0, 2q), `iid` = official dev = [2q, 3q),
    `ood` = official test = the rest.
    """
    num_variations = NUM_VARIATIONS[task_name]
    quarter = num_variations // 4
    return {
        "train": range(2 * quarter),
        "iid": range(2 * quarter, 3 * quarter),
        "ood": range(3 * quarter, num_variations),
    }[split]
