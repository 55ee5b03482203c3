"""Makes TextWorld games in a process of its own: `python -m epo.environments.adapters._textworld_games FOLDER JSON`.

Apart, because the generator draws from sets and compiles with Inform 7: with its own hash seed the same options make
the same games, and the training process never loads it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def make_games(folder: Path, plan: dict[str, dict[str, Any]]) -> None:
    """Make and compile every game of `plan` (id to settings) into `folder`, with a manifest of their walkthroughs."""
    import textworld

    manifest: dict[str, list[str]] = {}
    for number, (id, settings) in enumerate(plan.items()):
        options = textworld.GameOptions()
        options.seeds = settings["seed"]
        options.nb_rooms = settings["rooms"]
        options.nb_objects = settings["objects"]
        options.quest_length = settings["quest_length"]
        options.path = str(folder / f"{number}.z8")
        _, game = textworld.make(options)
        manifest[id] = list(game.metadata["walkthrough"])
        if len(manifest[id]) != settings["quest_length"]:  # the generator gives up silently
            raise ValueError(f"{id} got a quest of {len(manifest[id])} actions, not {settings['quest_length']}")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


if __name__ == "__main__":
    make_games(Path(sys.argv[1]), json.loads(sys.argv[2]))
