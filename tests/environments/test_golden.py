"""The environments say word for word what the kept transcripts say they said."""

from __future__ import annotations

import json

import golden_transcripts
import pytest


@pytest.mark.parametrize("name", ["scienceworld", "household"])
def test_the_kept_transcripts_replay(name):
    kept = json.loads((golden_transcripts.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert kept["episodes"]
    assert all(episode["turns"][-1]["success"] for episode in kept["episodes"])
    assert getattr(golden_transcripts, name)() == kept
