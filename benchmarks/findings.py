"""The tables of docs/findings.md, from the runs that are kept under benchmarks/results/.

    python benchmarks/findings.py            # writes them between the page's markers
    python benchmarks/findings.py --check    # exit code 1 if the page says anything else than the data

What is computed was fixed before the runs: a run's success is that of its training episodes in the last fifth of its
steps (hundreds of episodes, where a panel has some dozens), its oscillation the standard deviation of the change of
mean entropy from one step to the next over the whole run. Differences between two arms get the exact two-sided
permutation test over seeds: the share of all ways to deal the same numbers to the two arms that differ by as much.
That arms are compared on the seeds both have was decided later.
"""

from __future__ import annotations

import argparse
import itertools
import operator
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from epo.evaluation.comparison import (
    TRAINING,
    Arm,
    Comparison,
    compare,
    environment_steps,
    last_part,
    metric_by_step,
    oscillation_of_entropy,
    sampled_tokens,
    window_mean,
)
from epo.evaluation.statistics import bootstrap_interval, improvement_probability, interquartile_mean
from epo.reporting.reading.run_reader import RunData, find_runs, read_run

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "findings.md"
WINDOW = 0.2
RESAMPLES = 10_000
OF_THE_CLOCK = re.compile(r"time/|memory/|tokens/per_second")
SHORTEST_PANEL = 24
"""Episodes: below that a mean over five seeds is known to no better than about 0.1."""

Values = NDArray[np.float64]


def per_seed(comparison: Comparison, arm: Arm, what: str, *, seeds: Collection[int | None] | None = None) -> Values:
    """One number for each complete run of an arm, or for those with one of these seeds."""
    read = {
        "success": lambda run: window_mean(run, TRAINING, window=WINDOW),
        "iid": lambda run: window_mean(run, "iid", window=WINDOW),
        "ood": lambda run: window_mean(run, "ood", window=WINDOW),
        "oscillation": oscillation_of_entropy,
        "highest": lambda run: max(metric_by_step(run, "entropy/mean").values()),
        "lowest": lambda run: min(means_of_five(list(metric_by_step(run, "success/train").values()))),
        "best": lambda run: max(means_of_five(list(metric_by_step(run, "success/train").values()))),
        "entropy": lambda run: last_part(run, "entropy/mean", window=WINDOW),
        "turns": environment_steps,
        "tokens": sampled_tokens,
    }[what]
    runs = [comparison.runs[i] for i in arm.complete]
    return np.array([read(run) for run in runs if seeds is None or run.seed in seeds], dtype=float)


def seeds_of(comparison: Comparison, arm: Arm) -> list[int | None]:
    return [comparison.runs[i].seed for i in arm.complete]


def panel(comparison: Comparison, arm: Arm, split: str) -> str:
    """Success on a panel, left out where a panel is shorter than those the page speaks of."""
    played = [comparison.runs[i].evaluations[-1]["panels"] for i in arm.complete]
    counts = [entry["episodes"] for panels in played for entry in panels if entry["split"] == split]
    episodes = min(counts, default=0)
    return with_interval(per_seed(comparison, arm, split)) if episodes >= SHORTEST_PANEL else ""


def means_of_five(success: Sequence[float]) -> list[float]:
    """Means of five steps in a row: the lowest says how deep a run fell; the highest is the best of the run, chosen by
    its result and therefore biased upward."""
    return [float(np.mean(success[i : i + 5])) for i in range(len(success) - 4)]


def permutation_p(ours: Values, theirs: Values) -> float:
    """Exact two-sided permutation test of a difference in means."""
    together = np.concatenate([ours, theirs])
    seen = abs(ours.mean() - theirs.mean())
    total, count = together.sum(), len(ours)
    sums = np.array([together[list(chosen)].sum() for chosen in itertools.combinations(range(len(together)), count)])
    differences = np.abs(sums / count - (total - sums) / (len(together) - count))
    return float((differences >= seen - 1e-12).mean())


def ratio_interval(ours: Values, theirs: Values) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the ratio of means; seeds of each arm are drawn anew."""
    rng = np.random.default_rng(0)
    up, down = (x[rng.integers(len(x), size=(RESAMPLES, len(x)))].mean(axis=1) for x in (ours, theirs))
    low, high = np.quantile(up / np.maximum(down, 1e-9), (0.025, 0.975))
    return float(low), float(high)


def with_interval(values: Values, digits: int = 2) -> str:
    interval = bootstrap_interval([values])
    mean = f"{values.mean():.{digits}f}"
    return mean if interval is None else f"{mean} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"


def ratio(ours: Values, theirs: Values) -> str:
    low, high = ratio_interval(ours, theirs)
    return f"{ours.mean() / theirs.mean():.2f} ({low:.2f} to {high:.2f})"


def arm_names(comparison: Comparison) -> dict[str, str]:
    """What an arm is called in its sweep: the part of its runs' names before the seed."""
    return {arm.name: comparison.runs[arm.runs[0]].name.rpartition("--seed")[0] for arm in comparison.arms}


def runs_of(sources: Sequence[str]) -> list[RunData]:
    """`sweep` is all its runs, `sweep/arm` those of an arm, `sweep/arm@0,1` those with these seeds."""
    found: list[Path] = []
    for source in sources:
        sweep, _, rest = source.partition("/")
        name, _, seeds = rest.partition("@")
        for run in find_runs([HERE / "results" / sweep]):
            arm, _, seed = run.name.rpartition("--seed")
            if (not name or arm == name) and (not seeds or seed in seeds.split(",")):
                found.append(run)
    return [read_run(run) for run in found]


def table(sources: Sequence[str]) -> str:
    """Two tables, success and entropy; each arm against the first without entropy control, on the seeds both have."""
    comparison = compare(runs_of(sources), window=WINDOW)
    names = arm_names(comparison)
    base = next(arm for arm in comparison.arms if arm.name == comparison.baseline)

    def both(arm: Arm, what: str) -> tuple[Values, Values]:
        shared = set(seeds_of(comparison, arm)) & set(seeds_of(comparison, base))
        return per_seed(comparison, arm, what, seeds=shared), per_seed(comparison, base, what, seeds=shared)

    lines = [
        "| arm | seeds | success, training | IQM | over the baseline's | P(better) | p "
        "| `iid` | `ood` | lowest five steps | best five steps (biased) |",
        "| --- " * 11 + "|",
    ]
    for arm in comparison.arms:
        success = per_seed(comparison, arm, "success")
        versus = ["", "", ""]
        ours, theirs = both(arm, "success")
        if arm is not base and len(ours):
            better = improvement_probability([(ours, theirs)])
            versus = [ratio(ours, theirs), f"{better:.2f}", f"{permutation_p(ours, theirs):.2f}"]
        cells = [
            f"`{names[arm.name]}`: {arm.name}",
            ", ".join(map(str, seeds_of(comparison, arm))),
            with_interval(success),
            f"{float(interquartile_mean(success)):.2f}",
        ]
        panels = [panel(comparison, arm, split) for split in ("iid", "ood")]
        ends = [with_interval(per_seed(comparison, arm, what)) for what in ("lowest", "best")]
        lines.append("| " + " | ".join([*cells, *versus, *panels, *ends]) + " |")
    lines += [
        "",
        "| arm | highest entropy | oscillation | over the baseline's | p | entropy at the end | turns | tokens |",
        "| --- " * 8 + "|",
    ]
    for arm in comparison.arms:
        versus = ["", ""]
        ours, theirs = both(arm, "oscillation")
        if arm is not base and len(ours):
            versus = [ratio(ours, theirs), f"{permutation_p(ours, theirs):.3f}"]
        oscillation = with_interval(per_seed(comparison, arm, "oscillation"), 3)
        highest, end = (with_interval(per_seed(comparison, arm, what)) for what in ("highest", "entropy"))
        budget = [f"{per_seed(comparison, arm, what).mean():,.0f}" for what in ("turns", "tokens")]
        lines.append("| " + " | ".join([f"`{names[arm.name]}`", highest, oscillation, *versus, end, *budget]) + " |")
    return "\n".join(lines)


def search_table(sweep: str) -> str:
    """A line for each method, a cell entry for each of its settings: success, best first. One seed."""
    methods: dict[str, list[tuple[float, str]]] = {}
    for run in runs_of([sweep]):
        arm = run.name.rpartition("--seed")[0]
        method, _, setting = arm.partition("-")
        success = window_mean(run, TRAINING, window=WINDOW)
        entry = f"{setting or 'default'} {success:.2f} ({oscillation_of_entropy(run):.3f})"
        methods.setdefault(method, []).append((success, entry))
    ordered = sorted(methods.items(), key=lambda item: -max(item[1])[0])
    rows = [f"| `{name}` | {'; '.join(entry for _, entry in sorted(found, reverse=True))} |" for name, found in ordered]
    return "\n".join(["| method | settings: success in training (oscillation), best first |", "| --- | --- |", *rows])


def repeats_table(sources: Sequence[str]) -> str:
    """A line for each of several runs of one seed: how long each goes as the first one does, and where it ends."""
    runs = runs_of(sources)
    first = fingerprints(runs[0])
    lines = ["| run | workers | steps as in the first | success, training | oscillation | highest entropy |"]
    lines.append("| --- " * 6 + "|")
    for run in runs:
        equal = sum(1 for _ in itertools.takewhile(bool, map(operator.eq, first, fingerprints(run))))
        numbers = (
            str(run.config["environment"]["workers"]),
            f"{equal} of {len(first)}",
            f"{window_mean(run, TRAINING, window=WINDOW):.2f}",
            f"{oscillation_of_entropy(run):.3f}",
            f"{max(metric_by_step(run, 'entropy/mean').values()):.2f}",
        )
        lines.append("| " + " | ".join([f"`{run.path.parent.name}/{run.name}`", *numbers]) + " |")
    return "\n".join(lines)


def fingerprints(run: RunData) -> list[tuple[float | None, ...]]:
    """Of every step all that was logged but what the clock says."""
    columns = [values for name, values in sorted(run.metrics.items()) if not OF_THE_CLOCK.match(name)]
    return list(zip(*columns, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 where page and data differ")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    marker = re.compile(r"<!-- (table|search|repeats) of (.+?) -->\n.*?<!-- end -->", re.DOTALL)
    makers = {"table": table, "search": lambda sources: search_table(sources[0]), "repeats": repeats_table}

    def fill(found: re.Match[str]) -> str:
        made = makers[found[1]](found[2].split())
        return f"<!-- {found[1]} of {found[2]} -->\n\n{made}\n\n<!-- end -->"

    filled = marker.sub(fill, page)
    if arguments.check:
        if filled != page:
            sys.exit("docs/findings.md differs from the data: run python benchmarks/findings.py")
        return
    PAGE.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
