"""The exported folder: the policy's files at its top, what they came from below `training/`, a model card.

README.md  config.json  model.safetensors  tokenizer files              a whole model, or
README.md  adapter_config.json  adapter_model.safetensors  base.json    an adapter
training/  config.yaml  metrics.jsonl  eval.jsonl  plot.svg
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from epo.config import Config
from epo.errors import StorageError, UserError
from epo.exporting.card import write_card
from epo.files import new_folder
from epo.models.hub import is_hub_name
from epo.training.adapters import BASE_FILE, CONFIG_FILE, Base, merged_tensors
from epo.training.checkpoint import choose_checkpoint, step_of
from epo.training.model_directory import quiet_libraries
from epo.training.policy import load_policy
from epo.training.run_folder import RunFolder

RECORDS = ("config.yaml", "metrics.jsonl", "eval.jsonl", "plot.svg")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    folder: Path
    kind: str
    """`model`, `adapter` or `merged model`."""
    step: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}


def export_run(
    path: Path, *, out: Path | None = None, checkpoint: str = "last", merge: bool = False, base: str | None = None
) -> Exported:
    """Write the policy of a run's checkpoint in the Hugging Face layout. Appears whole or not at all.

    Args:
        out: the folder to write; by default `exports/` and the run's name.
        checkpoint: `last`, `best`, or a number of finished steps.
        merge: write an adapter and its base as one model.
        base: of an adapter, the name under which others find its base; by default that of the recipe, if it is one of
            the Hugging Face hub.

    Raises:
        UserError: no such run or checkpoint, a folder that exists, or an adapter whose base others cannot find.
    """
    run = RunFolder.open(path)
    out = Path("exports") / path.resolve().name if out is None else out
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {str(out)!r} exists already: give another one, or delete it")
    chosen = choose_checkpoint(run.checkpoints, checkpoint, evaluations=run.evaluations(), run=run.id)
    if chosen is None:
        raise UserError(f"the run {str(path)!r} has no checkpoint yet: wait for one, or --resume the run")
    config, policy = run.config(), chosen / "policy"
    is_adapter = (policy / BASE_FILE).is_file()
    if not is_adapter and (merge or base is not None):
        option = "--merge" if merge else f"--base {base}"
        raise UserError(f"{option} is for adapters, and the run {str(path)!r} trained a whole model: leave it out")
    if merge and base is not None:
        raise UserError(f"--base {base} names the base of an adapter, and --merge leaves none: give one of them")
    found = public_base(Base.read(policy), base) if is_adapter and not merge else None
    kind = "model" if not is_adapter else "merged model" if merge else "adapter"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out) as draft:
            if merge:
                write_merged(policy, config, draft)
            else:
                shutil.copytree(policy, draft, dirs_exist_ok=True)
            if found is not None:
                _name_base(draft, found)
            (draft / "training").mkdir()
            for name in RECORDS:
                if (path / name).is_file():
                    shutil.copy2(path / name, draft / "training" / name)
            write_card(draft, run, config, step=step_of(chosen), kind=kind, base=found)
    except StorageError:
        raise
    except OSError as error:
        raise UserError(f"--out {str(out)!r} cannot be written ({error.strerror}): give another one") from None
    return Exported(folder=out, kind=kind, step=step_of(chosen))


def public_base(base: Base, name: str | None) -> str:
    """The name under which others find the model that an adapter belongs to.

    Raises:
        UserError: it has none.
    """
    if base.path == "tiny":
        raise UserError("the base of this adapter is the embedded model, which only epo makes: add --merge")
    if name is None and (os.path.isdir(base.path) or not is_hub_name(base.path)):
        raise UserError(
            f"the base of this adapter is {base.path!r} on this machine: add --base ORG/NAME, the name under which "
            "others find it, or --merge"
        )
    if name is not None and not is_hub_name(name):
        raise UserError(f"--base {name!r} is not the name of a model on the Hugging Face hub: write it as ORG/NAME")
    return name or base.path


def write_merged(adapter: Path, config: Config, folder: Path) -> None:
    """Write the model of an adapter with the adapter merged into it, in the types of its base."""
    quiet_libraries()
    policy = load_policy(adapter, config.model)
    policy.model.save_pretrained(folder, state_dict=dict(merged_tensors(policy.model, adapter=policy.adapter)))
    policy.tokenizer.save_pretrained(folder)


def _name_base(folder: Path, name: str) -> None:
    for file, key in ((CONFIG_FILE, "base_model_name_or_path"), (BASE_FILE, "path")):
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(content | {key: name}, indent=1), encoding="utf-8")
