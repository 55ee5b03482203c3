"""`epo explain smoothing`: the measured weights against the formula, and what is said of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from epo.cli import app
from epo.errors import UserError
from epo.reporting.smoothing import compare_profiles, effective_weights, plot_effective_weights


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({}, 125),
        ({"alpha": 3.0, "kappa_low": 0.4, "kappa_high": 1.2, "gamma": 1.0}, 40),
        ({"alpha": 0.3, "kappa_low": 0.9, "kappa_high": 4.0, "schedule": "constant", "reference": "per_turn"}, 7),
    ],
)
def test_measured_weights_are_those_of_the_gradient_identity(options: dict[str, object], total: int) -> None:
    found = effective_weights("x", "epo", options, total_steps=total)
    values = {"alpha": 0.05, "kappa_low": 0.0, "kappa_high": 2.0, "gamma": 3.0, **options}
    assert found.steps[0] == 0 and found.steps[-1] == total - 1
    for step, weights in zip(found.steps, found.weights, strict=True):
        beta = 1 + math.exp(-values["gamma"] * step / (total // 2)) if "schedule" not in options else 1.0
        for ratio, weight in zip(found.ratios, weights, strict=True):
            outside = (ratio < values["kappa_low"]) - (ratio > values["kappa_high"])
            assert weight == pytest.approx(1 + values["alpha"] * beta * outside, rel=1e-12)


def test_verdicts_say_what_the_profiles_do() -> None:
    verdicts = {setting.label: setting.verdict() for setting in compare_profiles(total_steps=125)}
    assert verdicts["epo, paper for ScienceWorld"] == (
        "never pushes entropy down: above 2 H_ref the bonus keeps at least 90% of its weight; no floor"
    )
    assert "keeps at least 80%" in verdicts["epo, paper for ALFWorld"]
    assert verdicts["epo_release"] == verdicts["epo_base"] == "no effect: the plain entropy bonus"
    assert verdicts["epo_strong"] == ("pushes entropy down above 2 H_ref at every step; no floor")
    floor = effective_weights("floor", "epo", {"alpha": 2.0, "kappa_low": 0.5, "kappa_high": 1.5}, total_steps=125)
    assert floor.verdict() == (
        "pushes entropy down above 1.5 H_ref at every step; below 0.5 H_ref the bonus is 3 to 5 times as strong"
    )
    half = effective_weights("half", "epo", {"alpha": 0.9, "kappa_low": 0.5}, total_steps=100)
    assert "until step 25 at least, not later" in half.verdict()


def test_a_penalty_that_grows_is_judged_over_the_whole_range() -> None:
    """squared: the weight above is 1 - 2 alpha beta (h - 2), which crosses zero at 2 + 1 / (2 alpha beta)."""
    verdict = effective_weights("x", "epo", {"penalty": "squared", "alpha": 0.6}, total_steps=100).verdict()
    late = 2 + 1 / (2 * 0.6 * (1 + math.exp(-3 * 99 / 50)))
    assert verdict.startswith("pushes entropy down at every step, the more the higher it is: above 2 H_ref")
    assert f"until {2 + 1 / 2.4:.2g} to {late:.2g} H_ref" in verdict
    weak = effective_weights("x", "epo", {"penalty": "squared", "alpha": 0.05}, total_steps=100).verdict()
    assert "keeps at least 60% of its weight" in weak  # at twice the edge: 1 - 2 * 0.05 * 2 * 2


@pytest.mark.parametrize("kappa", [(1e-5, 2.0), (0.0, 0.001), (0.999, 1.0)])
def test_narrow_corridors_are_measured_where_they_lie(kappa: tuple[float, float]) -> None:
    low, high = kappa
    found = effective_weights("x", "epo", {"alpha": 3.0, "kappa_low": low, "kappa_high": high}, total_steps=10)
    assert found.at(0, found.inside) == pytest.approx(1.0)
    assert found.at(0, found.above) == pytest.approx(-5.0)
    assert found.below is None or found.at(0, found.below) == pytest.approx(7.0)


def test_settings_without_a_smoothing_term_are_refused() -> None:
    with pytest.raises(UserError, match="has no smoothing term to explain"):
        effective_weights("x", "none", {}, total_steps=9)
    with pytest.raises(UserError, match="'epo_decay' has no smoothing term"):
        effective_weights("x", "epo_decay", {"max_turns": 9}, total_steps=9)
    with pytest.raises(UserError, match="coefficient=0"):
        effective_weights("x", "epo", {"coefficient": 0.0}, total_steps=9)


def test_the_command_prints_plots_and_speaks_json(tmp_path: Path) -> None:
    plot = tmp_path / "deep" / "plot.png"
    run = CliRunner().invoke(app, ["explain", "smoothing", "--plot", str(plot)], env={"COLUMNS": "200"})
    assert run.exit_code == 0
    assert "epo_strong: pushes entropy down" in run.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    own = [
        "explain",
        "smoothing",
        "base",
        "entropy.method=epo",
        "entropy.alpha=1.2",
        "entropy.kappa_low=0.5",
        "steps=10",
    ]
    run = CliRunner().invoke(app, [*own, "--plot", str(plot), "--json"])
    (setting,) = json.loads(run.output)
    assert setting["weights"]["0"] == pytest.approx({"below": 3.4, "inside": 1.0, "above": -1.4})


def test_the_plot_has_a_panel_for_each_setting(tmp_path: Path) -> None:
    settings = compare_profiles(total_steps=9)
    plot_effective_weights(settings, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text.count("token entropy / historical entropy") == len(settings)


@pytest.mark.parametrize("place", ["", "plot", "plot.xyz", "file.txt/plot.png"])
def test_a_plot_that_cannot_be_written_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError, match="--plot"):
        plot_effective_weights(compare_profiles(total_steps=9), tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
