"""Options of `EPOConfig`, and what is refused."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from epo.errors import UserError
from epo.integrations.trl import EPOConfig, EPOTrainer, compatibility
from epo.objectives import METHODS, method_options

Make = Callable[..., EPOConfig]

WORKING = {"none", "bonus", "epo_base", "epo", "epo_constant_beta", "epo_strong", "epo_decay", "adaptive"}
SOURCE = Path(__file__).parents[2] / "src" / "epo"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_or_is_refused_by_name_with_the_reason(method: str, config: Make) -> None:
    if method in WORKING:
        control = config(epo_method=method, max_tool_calling_iterations=3).make_control()
        assert type(control) is METHODS[method].control
        return
    with pytest.raises(UserError, match=f"epo_method='{method}' does not work inside TRL: it ") as refused:
        config(epo_method=method)
    assert "With TRL work: none, bonus" in str(refused.value)


def test_every_option_of_a_working_method_has_a_documented_field() -> None:
    options = {f"epo_{option}" for method in WORKING for option in method_options(method)} | {"epo_method"}
    own = {name: item for name, item in EPOConfig.__dataclass_fields__.items() if name.startswith("epo_")}
    assert own.keys() == options
    for name, item in own.items():
        assert item.metadata["help"]
        assert f"        {name} (" in (EPOConfig.__doc__ or "")


def test_options_reach_the_method_and_others_keep_its_defaults(config: Make) -> None:
    control: Any = config(epo_method="epo_strong", epo_alpha=3.0, epo_reference="per_turn").make_control()
    assert (control.alpha, control.kappa_low, control.kappa_high) == (3.0, 0.0, 2.0)
    assert control.history.kind == "per_turn"
    decay: Any = config(epo_method="epo_decay", max_tool_calling_iterations=3).make_control()
    assert decay.max_turns == 4


def test_options_can_be_given_on_a_command_line(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--epo_method", "epo", "--epo_alpha", "2", "--epo_window", "7"]
    (parsed,) = HfArgumentParser(EPOConfig).parse_args_into_dataclasses([*words, "--epo_history", "sliding"])
    assert (parsed.epo_alpha, parsed.epo_window, parsed.epo_history) == (2.0, 7, "sliding")
    assert parsed.epo_gamma is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epo_method": "ep0"}, "epo_method='ep0' is no entropy control method; with TRL work: none, bonus"),
        (
            {"epo_method": "bonus", "epo_alpha": 1.0},
            "epo_alpha is no option of epo_method='bonus'; its options: ",
        ),
        ({"epo_alpha": -1.0}, "epo_method='epo': coefficient and alpha must be >= 0"),
        ({"epo_schedule": "papers"}, "schedule must be one of paper, constant, got 'papers'"),
        ({"epo_method": "epo_decay"}, "needs epo_max_turns"),
        ({"entropy_coef": 0.1}, "entropy_coef=0.1"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=True"),
    ],
)
def test_bad_options_are_refused_when_the_configuration_is_made(
    options: dict[str, Any], message: str, config: Make
) -> None:
    with pytest.raises(UserError) as refused:
        config(**options)
    assert message in str(refused.value)


def test_unknown_options_are_refused(config: Make) -> None:
    with pytest.raises(TypeError, match="epo_alfa"):
        config(epo_alfa=1.0)


def test_a_configuration_of_trl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"args=EPOConfig\(\.\.\.\), got GRPOConfig"):
        EPOTrainer("nowhere", None, GRPOConfig(str(tmp_path), use_cpu=True))


def test_a_trl_without_what_is_built_on_is_refused_with_the_versions_that_work() -> None:
    compatibility.check_class(GRPOTrainer)

    class Older(GRPOTrainer):
        loss_is_scaled_for_ga = None  # type: ignore[assignment]

        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any: ...

    with pytest.raises(UserError) as refused:
        compatibility.check_class(Older)
    message = str(refused.value)
    assert "works with TRL 1.16.0; the installed TRL" in message
    assert "GRPOTrainer._get_per_token_logps_and_entropies(compute_entropy)" in message
    assert "GRPOTrainer.loss_is_scaled_for_ga" in message
    assert "_compute_loss" not in message


def test_without_trl_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "trl":
                raise ModuleNotFoundError("No module named 'trl'", name="trl")

    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Nothing(), *sys.meta_path])
    spec = importlib.util.spec_from_file_location("again", compatibility.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(UserError, match=r"needs TRL 1\.16\.0, which is not installed: pip install 'trl==1\.16\.0'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_nothing_else_of_epo_imports_the_integrations() -> None:
    room = SOURCE / "integrations"
    assert (room / "trl" / "trainer.py").is_file()
    for file in SOURCE.rglob("*.py"):
        if room in file.parents:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [m for m in modules if m.startswith(("epo.integrations", "trl"))], file
