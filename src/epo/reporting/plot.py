"""The run at a glance: success on the panels, and the entropy of early and late turns."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epo.files import write_atomically

# Okabe and Ito's palette: distinguishable with any kind of colour vision.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#7f7f7f"


def plot_run(
    path: Path, *, title: str, metrics: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]
) -> None:
    """Draw `metrics` and `evaluations` (lines of the run's files) into `path`; the suffix decides the format."""
    import matplotlib

    matplotlib.use("Agg")
    # Fixed salt and no date: the same run gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "epo"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    success, entropy = figure.subplots(1, 2)
    steps = [line["step"] for line in metrics]
    success.plot(steps, [line["success/train"] for line in metrics], color=_GREY, alpha=0.5, label="train")
    for split, colour, marker in (("iid", _BLUE, "o"), ("ood", _ORANGE, "s")):
        points = [(e["step"], p) for e in evaluations for p in e["panels"] if p["split"] == split]
        if points:
            rates = [p["success"] for _, p in points]
            error = [[p["success"] - p["low"] for _, p in points], [p["high"] - p["success"] for _, p in points]]
            success.errorbar(
                [s for s, _ in points], rates, yerr=error, color=colour, marker=marker, capsize=3, label=split
            )
    success.set(title="Success (95 % intervals)", xlabel="RL step", ylabel="share of episodes", ylim=(-0.02, 1.02))
    for name, colour, style, label in (
        ("entropy/turn_early", _BLUE, "-", "first third of turns"),
        ("entropy/turn_late", _ORANGE, "--", "last third of turns"),
        ("entropy/mean", _GREEN, ":", "all tokens"),
    ):
        points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
        entropy.plot([s for s, _ in points], [h for _, h in points], color=colour, linestyle=style, label=label)
    entropy.set(title="Entropy per token", xlabel="RL step", ylabel="nats")
    for axes in (success, entropy):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.suptitle(title)
    kind = path.suffix.removeprefix(".")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, drawn.getvalue())
