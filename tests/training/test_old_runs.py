"""Runs of older versions go on; what is lost or unknown is said in one line.

`old_runs/format_1` is a run that version 0.1.0 left at commit 4631a26, stopped after two of four steps: checkpoints of
format 1, a configuration without the keys that came later. Reports and the summary are left out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from quiet import QuietObserver
from test_runs_repeat import metrics_of

from epo.errors import UserError
from epo.evaluation.session import evaluate_target
from epo.recipe import apply_overrides
from epo.training.checkpoint import FORMAT, read_state
from epo.training.run_folder import RunFolder
from epo.training.session import train_run

OLD = Path(__file__).parent / "old_runs" / "format_1"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def test_an_old_run_goes_on_and_is_of_the_new_format_from_there(old: Path):
    written = yaml.safe_load((old / "config.yaml").read_text())
    assert "best" not in written["checkpoint"] and "skipped" not in written["record"]
    config = RunFolder.open(old).config()
    assert config.checkpoint.best and config.record.skipped == 4  # defaults
    before = metrics_of(old)
    config = apply_overrides(config, ["checkpoint.keep=3"])  # what is kept may change when a run goes on
    assert train_run(config, old, QuietObserver(), resume=True)["finished"]
    assert metrics_of(old)[:2] == before and [line["step"] for line in metrics_of(old)] == [1, 2, 3, 4]
    formats = {path.name: read_state(path)["format"] for path in sorted((old / "checkpoints").iterdir())}
    assert formats["step_000002"] == 1 and formats["step_000004"] == FORMAT == 2
    results, _ = evaluate_target(old, recipe=None, overrides=[], observer=QuietObserver(), checkpoint="2")
    assert [result.split for result in results] == ["iid"]


@pytest.mark.parametrize("file", ["policy/model.safetensors", "optimizer.safetensors", "critic.safetensors"])
def test_damage_that_the_old_checksums_cover_is_found(file: str, old: Path):
    damaged = old / "checkpoints" / "step_000002" / file
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"damaged \({file}: .*no older one is whole"):
        train_run(RunFolder.open(old).config(), old, QuietObserver(), resume=True)


def test_keys_that_this_version_does_not_know_are_named_with_the_version_that_does(old: Path):
    written = yaml.safe_load((old / "config.yaml").read_text())
    written["checkpoint"]["mirror"] = "s3"
    (old / "config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(UserError) as refused:
        RunFolder.open(old).config()
    message = str(refused.value)
    for part in (str(old / "config.yaml"), "'checkpoint.mirror'", "use the version that wrote it, 0.1.0", "mend the"):
        assert part in message
    # What it says helps.
    del written["checkpoint"]["mirror"]
    (old / "config.yaml").write_text(yaml.safe_dump(written))
    assert RunFolder.open(old).config().steps == 4


def test_a_state_of_other_fields_asks_for_its_version(old: Path):
    file = old / "checkpoints" / "step_000002" / "state.json"
    content = json.loads(file.read_text())
    content["state"]["tokens_seen"] = 5
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"another version of epo \(.*tokens_seen.*\): use that one"):
        train_run(RunFolder.open(old).config(), old, QuietObserver(), resume=True)
