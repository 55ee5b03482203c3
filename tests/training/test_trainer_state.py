"""What a checkpoint says of the loop is checked before it is believed: checksums are no proof of who wrote it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quiet import QuietObserver

from epo.errors import UserError
from epo.training.checksums import write_checksums
from epo.training.run_folder import RunFolder
from epo.training.session import train_run
from epo.training.trainer_state import TrainerState

OLD = Path(__file__).parent / "old_runs" / "format_1"
CHECKPOINT = Path("checkpoints") / "step_000002"
PANEL = {"split": "iid", "success": 0.5, "low": 0.25, "high": 0.75, "episodes": 4}

BAD: dict[str, Any] = {
    "step": ["x", -5, 10**9, 2.0, True, None, 1],
    "entropy_by_step": [None, "x", [1.0, 2.0, 3.0], [None], [float("nan")], [10**400], {"0": 1.0}],
    "evaluations": [
        None,
        [1],
        [{}],
        [{"step": 0}],
        [{"step": "0", "panels": []}],
        [{"step": 3, "panels": [PANEL]}],
        [{"step": 0, "panels": [PANEL | {"success": "x"}]}],
        [{"step": 0, "panels": [PANEL | {"success": 0.9}]}],
        [{"step": 0, "panels": [PANEL | {"episodes": 0}]}],
        [{"step": 0, "panels": [PANEL | {"by_goal": {"x": float("inf")}}]}],
    ],
    "wall_seconds": ["1", -1.0, float("inf"), 10**400],
    "reference": [5, ["x"]],
}


def state_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())["state"]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def test_what_a_run_kept_is_taken_over_and_kept_again_as_it_was() -> None:
    kept = state_of(OLD / CHECKPOINT)
    assert json.dumps(TrainerState.kept_in(CHECKPOINT, kept).model_dump()) == json.dumps(kept)
    assert TrainerState.kept_in(Path("step_000000"), {}).model_dump() == TrainerState().model_dump()


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_one_line_names_file_field_value_and_mend(field: str, value: Any) -> None:
    with pytest.raises(UserError) as refused:
        TrainerState.kept_in(CHECKPOINT, state_of(OLD / CHECKPOINT) | {field: value})
    message = str(refused.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000
    assert repr(str(CHECKPOINT / "state.json")) in message and f"state.{field}" in message
    assert "is not allowed (" in message and f"delete {str(CHECKPOINT)!r}" in message


@pytest.mark.parametrize("resealed", [False, True])
def test_a_resumption_refuses_such_a_state_and_leaves_the_run_as_it_was(resealed: bool, old: Path) -> None:
    file = old / CHECKPOINT / "state.json"
    content = json.loads(file.read_text())
    content["state"]["step"] = "x"
    if resealed:
        del content["sha256"]
        content["format"] = 2
    file.write_text(json.dumps(content))
    if resealed:
        write_checksums(old / CHECKPOINT)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"state\.json': state\.step='x' is not allowed"):
        train_run(RunFolder.open(old).config(), old, QuietObserver(), resume=True)
    assert {path: path.read_bytes() for path in before} == before


def test_the_name_of_a_checkpoint_may_say_any_number_of_steps(old: Path) -> None:
    """Its steps are counted before they are listed."""
    with pytest.raises(UserError, match="lacks step 3"):
        RunFolder.open(old).require_steps(10**200)


@pytest.mark.parametrize(
    "line", ['{"step": 2}', '{"step": 2, "panels": [1]}', '{"step": 2, "panels": [{"split": "iid"}]}']
)
def test_lines_that_are_no_evaluations_are_left_out_when_the_best_is_chosen(line: str, old: Path) -> None:
    whole = RunFolder.open(old).evaluations()
    with (old / "eval.jsonl").open("a") as file:
        file.write(line + "\n")
    assert RunFolder.open(old).evaluations() == whole != []


def test_a_run_without_panels_ends_and_goes_on(minute_config: Callable[..., Any], tmp_path: Path) -> None:
    config = minute_config("steps=1", "evaluation.splits=[]")
    assert train_run(config, tmp_path / "run", QuietObserver(), resume=False)["best"] is None
    assert train_run(config, tmp_path / "run", QuietObserver(), resume=True)["finished"]
