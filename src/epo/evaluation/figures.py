"""The figures of EPO's paper (arXiv 2509.22576 version 2) that a comparison has the arms for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

EPO_METHODS = ("epo", "epo_strong", "epo_release")
ABLATIONS = ("epo_base", "bonus", "epo_constant_beta")
STUDIES = ("epo_decay", "ea")


def paper_figures(arms: Mapping[str, tuple[str, str]], *, splits: Sequence[str], suite: str) -> list[dict[str, Any]]:
    """Figures as plain data: an id, a title, a caption, and panels of a metric and the arms it is drawn for.

    Args:
        arms: name of each arm -> (algorithm, entropy method).
        splits: splits that were evaluated.
        suite: the environment, which decides between the paper's figures 2 and 5.
    """
    results = ["reward/mean", *(f"eval/{split}/success" for split in splits)]
    ppo = {name: method for name, (algorithm, method) in arms.items() if algorithm == "ppo"}
    plain = [name for name, (_, method) in arms.items() if method == "none"]
    treated = [name for name, (_, method) in arms.items() if method in EPO_METHODS]
    epo = [name for name, method in ppo.items() if method in EPO_METHODS]
    ablated = [name for name, method in ppo.items() if method in ABLATIONS]
    studied = [name for name, method in ppo.items() if method in STUDIES]
    plain_ppo = [name for name in plain if name in ppo]
    figures: list[dict[str, Any]] = []
    if plain_ppo:
        figures.append(
            _figure(
                "figure-1",
                "Figure 1: cascade",
                "Entropy of the first and the last third of the turns, and reward, without and with entropy control.",
                ["entropy/turn_early", "entropy/turn_late", "reward/mean"],
                [*plain_ppo, *epo, *ablated],
            )
        )
    if plain and treated:
        number = 2 if suite == "scienceworld" else 5
        figures.append(
            _figure(
                f"figure-{number}",
                f"Figure {number}: with and without EPO",
                "Reward in training and success on the panels.",
                results,
                [*plain, *treated],
            )
        )
    if epo and ablated:
        figures.append(
            _figure(
                "figure-3",
                "Figure 3: what the parts of EPO do",
                "EPO beside the entropy bonus alone, and beside EPO without its phase weight.",
                results,
                [*epo, *ablated],
            )
        )
    if epo and studied:
        figures.append(
            _figure(
                "figure-4",
                "Figure 4: other ways to use entropy",
                "EPO beside a bonus that fades, and beside advantages that grow with entropy.",
                [*results, "entropy/turn_late"],
                [*epo, *[name for name in ablated if ppo[name] != "epo_constant_beta"], *studied],
            )
        )
    return figures


def _figure(key: str, title: str, caption: str, metrics: Sequence[str], arms: Sequence[str]) -> dict[str, Any]:
    caption += " Mean over seeds with its pointwise 95 % bootstrap interval."
    return {
        "id": key,
        "title": title,
        "caption": caption,
        "panels": [{"metric": metric, "arms": list(arms)} for metric in metrics],
    }
