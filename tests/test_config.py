"""Configuration: every mistake is one line that names the key and the fix; whatever parses, parses again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from epo.config import Config
from epo.errors import UserError
from epo.objectives import METHODS, method_options
from epo.recipe import apply_overrides, load_config, parse_config, recipe_names


def refusal(recipe: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def write(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return str(folder / f"{name}.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.learning_rat=1", "unknown key 'optimizer.learning_rat' (did you mean 'learning_rate'?)"),
        ("kappa_high=3", "unknown key 'kappa_high' (did you mean 'entropy.kappa_high'?)"),
        ("model.tiny.layer=2", "unknown key 'model.tiny.layer' (did you mean 'layers'?)"),
        ("entrpy.alpha=1", "unknown key 'entrpy' (did you mean 'entropy'?)"),
        ("algorithm.critic.xyz=1", "Valid here: trunk, learning_rate, coefficient, clip"),
    ],
)
def test_unknown_keys_name_the_nearest(override: str, expected: str) -> None:
    assert expected in refusal("base", override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("environment.workers=0", "environment.workers=0 is not allowed: input should be greater than or equal to 1"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate=0"),
        ("optimizer.learning_rate=.inf", "finite"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate=nan"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1=1.0"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9"),
        ("optimizer=3", "optimizer=3 is not allowed: a section of keys and values goes here"),
        ("algorithm.gamma=1.1", "algorithm.gamma=1.1"),
        ("algorithm.name=sac", "algorithm.name='sac' is not allowed: input should be 'ppo', 'grpo', 'dr_grpo',"),
        ("steps=1.5", "steps=1.5"),
        ("steps=many", "steps='many'"),
        ("evaluation.splits=iid", "evaluation.splits='iid'"),
        ("environment.options=[1]", "environment.options=[1]"),
        ("environment.options={1: 2}", "environment.options.1"),
        ("environment={1: 2}", "environment.1=1 is not allowed: keys should be strings"),
        (
            "entropy.method=epoo",
            "entropy: unknown entropy control method: 'epoo'; did you mean 'epo'? Valid: none",
        ),
        ("entropy.alpha=1", "entropy: unknown option of entropy control 'none': 'alpha'. Valid: (no options)"),
        ("model.tiny.hidden_size=190", "model.tiny: hidden_size 190 must be a multiple of 2*heads (8)"),
        ("agent.max_response_tokens=2048", "set it below model.max_context 2048"),
        (
            "algorithm.name=grpo",
            "algorithm.name=grpo compares episodes of one task: set rollout.group_size to 2 or more",
        ),
        ("algorithm.name=dr_grpo", "set rollout.group_size to 2 or more"),
        ("algorithm.name=rloo", "set rollout.group_size to 2 or more"),
        ("algorithm.name=gigpo", "set rollout.group_size to 2 or more"),
        (
            "algorithm={name: reinforce_pp, reinforce_baseline: true}",
            "algorithm.reinforce_baseline=true compares episodes",
        ),
        (
            "algorithm.filter=starpo_s",
            "algorithm.filter=starpo_s compares episodes of one task: set rollout.group_size",
        ),
        ("algorithm.filter=snr", "algorithm.filter=snr compares episodes of one task: set rollout.group_size"),
        ("algorithm.filter_keep=0", "algorithm.filter_keep=0"),
        ("imitation.demonstrations=0", "set imitation.demonstrations, or give a model directory"),
        (
            "algorithm.filter_keep=0.5",
            "algorithm: filter_keep=0.5 does nothing without a filter: set filter to starpo_s",
        ),
        ("algorithm.gigpo_weight=2", "gigpo_weight=2.0 does nothing with name=ppo: leave it out, or set name to gigpo"),
        ("algorithm.normalise_std=false", "does nothing with name=ppo: leave it out, or set name to grpo"),
        (
            "model.lora.targets=attention",
            "model.lora: targets=attention does nothing with rank=0: leave it out, or set",
        ),
        ("sampler.kv_gib=4", "sampler: kv_gib=4.0 does nothing with name=local: leave it out, or set name to vllm"),
        ("sampler.importance_cap=3", "leave it out, or set sampler.old_logprobs to learner"),
        ("sampler={name: vllm, old_logprobs: sampler}", "set sampler.old_logprobs to learner or auto"),
        ("name=[" + "x" * 5000 + "]", "..."),
    ],
)
def test_bad_values_name_the_key_and_what_is_allowed(override: str, expected: str) -> None:
    message = refusal("base", override)
    assert expected in message
    assert len(message) < 500


def test_stale_weights_need_the_learners_log_probabilities() -> None:
    message = refusal("base", "sampler.old_logprobs=sampler", "cluster.max_staleness=1")
    assert "cluster.max_staleness=1" in message and "to learner or auto" in message
    config = load_config("base", ["cluster.max_staleness=1", "sampler.importance_cap=3"])
    assert config.is_rescored


def test_what_later_rows_show_again_is_not_taught_twice() -> None:
    message = refusal("base", "imitation.observation_weight=0.5", "agent.overflow=drop_oldest")
    assert "set the first to 0 or the second to end" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("entropy.kapa_low=1", "option of entropy control 'epo': 'kapa_low'; did you mean 'kappa_low'?"),
        ("entropy.kappa_low=2", "entropy: the corridor needs 0 <= kappa_low < kappa_high, got 2.0 and 2.0"),
        ("entropy.alpha=much", "entropy: alpha='much' is not allowed: input should be a valid number"),
        ("entropy.alpha=.nan", "entropy: alpha=nan is not allowed: input should be a finite number"),
        ("entropy.penalty=hinge", "entropy: penalty='hinge' is not allowed: input should be 'relu', 'indicator' or"),
        ("entropy.window=2.5", "entropy: window=2.5 is not allowed"),
        ("entropy.options={}", "option of entropy control 'epo': 'options'"),
    ],
)
def test_bad_options_of_an_entropy_control(override: str, expected: str) -> None:
    message = refusal("scienceworld-ppo-epo", override)
    assert expected in message
    assert len(message.splitlines()) == 1


def test_options_of_an_entropy_control_are_filled_in_and_typed() -> None:
    config = load_config("base", ["entropy.coefficient=1e-2", "entropy.method=epo_strong", "entropy.alpha=3"])
    assert config.entropy.options() == {**method_options("epo_strong"), "coefficient": 0.01, "alpha": 3.0}
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    # What a method cannot know by itself comes from the rest of the recipe.
    decay = load_config("base", ["entropy.method=epo_decay", "environment.max_turns=17"])
    assert decay.entropy.options()["max_turns"] == 17


def test_another_method_starts_from_its_own_defaults(tmp_path: Path) -> None:
    parent = write(tmp_path, "parent", "entropy: {method: epo, coefficient: 0.5, alpha: 0.7}")
    same = write(tmp_path, "same", "extends: parent\nentropy: {method: epo, gamma: 1}")
    other = write(tmp_path, "other", "extends: parent\nentropy: {method: bonus}")
    assert load_config(same).entropy.options()["coefficient"] == 0.5
    assert load_config(other).entropy.options() == method_options("bonus")
    assert load_config(parent, ["entropy.method=bonus"]).entropy.options() == method_options("bonus")
    assert load_config(parent, ["entropy.method=epo"]).entropy.options()["alpha"] == 0.7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("", "not of the form key=value"),
        ("steps.deep=3", "'steps' is a value, not a section"),
        ("name=[", "not valid YAML; quote it"),
        ("name=2024-13-45", "not valid YAML; quote it"),
        ("name=!!bool perhaps", "not valid YAML; quote it"),
        ("model..path=x", "unknown key 'model.'"),
    ],
)
def test_bad_overrides(override: str, expected: str) -> None:
    assert expected in refusal("scienceworld-ppo", override)


def test_overrides_are_typed_nested_and_later_ones_win() -> None:
    config = load_config(
        "base",
        [
            "optimizer.learning_rate=1e-4",
            "algorithm.critic.clip=0.5",
            "algorithm.dual_clip=null",
            "evaluation.splits=[iid]",
            "optimizer.betas=[0.8, 0.99]",
            "environment.options.simplification=easy",
            "environment.options.tasks=[a, b]",
            "name=a=b",
            "steps=1",
            "steps=2",
        ],
    )
    assert config.optimizer.learning_rate == 1e-4
    assert (config.algorithm.critic.clip, config.algorithm.dual_clip) == (0.5, None)
    assert config.evaluation.splits == ["iid"]
    assert config.optimizer.betas == (0.8, 0.99)
    assert config.environment.options == {"simplification": "easy", "tasks": ["a", "b"]}
    assert (config.name, config.steps) == ("a=b", 2)


def test_options_belong_to_one_suite() -> None:
    recipe = "scienceworld-ppo"
    assert "tasks" in load_config(recipe).environment.options
    assert "tasks" in load_config(recipe, ["environment.suite=scienceworld"]).environment.options
    own = ["environment.options.size=3", "environment.suite=household"]
    for overrides in (own, own[::-1]):
        assert load_config(recipe, overrides).environment.options == {"size": 3}
        assert apply_overrides(load_config(recipe), overrides).environment.options == {"size": 3}


def test_a_child_that_changes_the_suite_inherits_no_options(tmp_path: Path) -> None:
    write(tmp_path, "parent", "environment: {suite: a, workers: 3, options: {x: 1}}")
    other = load_config(write(tmp_path, "other", "extends: parent\nenvironment: {suite: b, options: {y: 2}}"))
    assert (other.environment.options, other.environment.workers) == ({"y": 2}, 3)
    same = load_config(write(tmp_path, "same", "extends: parent\nenvironment: {suite: a, options: {y: 2}}"))
    assert same.environment.options == {"x": 1, "y": 2}


def test_recipes_extend_a_chain_of_recipes(tmp_path: Path) -> None:
    write(tmp_path, "a", "steps: 1\nseed: 1\noptimizer: {epochs: 1, minibatches: 7}\nname: a")
    write(tmp_path, "b", "extends: a.yaml\nsteps: 2\noptimizer: {epochs: 2}")
    config = load_config(write(tmp_path, "c", "extends: b\nsteps: 3"))
    assert (config.name, config.steps, config.seed) == ("c", 3, 1)
    assert (config.optimizer.epochs, config.optimizer.minibatches) == (2, 7)
    shipped = load_config(write(tmp_path, "d", "extends: household-grpo\nsteps: 3"))
    assert (shipped.name, shipped.steps, shipped.algorithm.name) == ("d", 3, "grpo")


def test_broken_chains_are_user_errors(tmp_path: Path) -> None:
    write(tmp_path, "a", "extends: b")
    assert "extends itself: b.yaml -> a.yaml -> b.yaml" in refusal(write(tmp_path, "b", "extends: a"))
    assert "extends itself" in refusal(write(tmp_path, "self", "extends: self"))
    orphan = refusal(write(tmp_path, "orphan", "extends: scienceworld-pp"))
    assert "unknown recipe 'scienceworld-pp' (did you mean 'scienceworld-ppo'?)" in orphan
    assert "unknown recipe '[1]'" in refusal(write(tmp_path, "list", "extends: [1]"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "cannot be read as YAML"),
        ("- a\n- b", "must be a mapping of sections, not a list"),
        ("name: 2024-13-45", "cannot be read as YAML"),
        ("environment:\n", "environment=None is not allowed: a section"),
        ('"a\\nb": 1', "unknown key 'a\\nb'"),
    ],
)
def test_broken_recipe_files_are_user_errors(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(write(tmp_path, "broken", text))


def test_files_that_are_not_text_are_user_errors(tmp_path: Path) -> None:
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe\x00name")
    assert str(file) in refusal(str(file))


@pytest.mark.parametrize("recipe", ["nope", "", "nope.yaml", "a\0b.yaml", "x" * 5000 + ".yaml", "_common", "."])
def test_unknown_recipes_list_the_known_ones(recipe: str) -> None:
    assert ", ".join(recipe_names()) in refusal(recipe)


@pytest.mark.parametrize("recipe", recipe_names())
def test_shipped_recipes_parse_and_round_trip(recipe: str) -> None:
    config = load_config(recipe)
    assert config.name == recipe.rpartition("/")[2]
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "run", "")) == Config()
    assert load_config("base").model_copy(update={"name": "run"}) == Config()


SECTIONS = {name: field.annotation for name, field in Config.model_fields.items()}
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 100),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=5),
    st.sampled_from(["tiny", "grpo", "epo", "window", "1e-4", "a\nb"]),
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def known_sections() -> st.SearchStrategy[dict[str, Any]]:
    def section(name: str) -> st.SearchStrategy[Any]:
        fields = getattr(SECTIONS[name], "model_fields", None)
        if fields is None:
            return values
        return st.dictionaries(st.sampled_from([*fields, *extra.get(name, [])]), leaves | values, max_size=3) | values

    extra = {"entropy": sorted({option for method in METHODS for option in method_options(method)})}
    return st.fixed_dictionaries({}, optional={name: section(name) for name in SECTIONS})


@settings(deadline=None)
@given(tree=known_sections() | st.dictionaries(st.text(max_size=5) | st.integers() | st.none(), values, max_size=3))
def test_any_tree_parses_or_is_a_one_line_user_error(tree: dict[Any, Any]) -> None:
    try:
        config = parse_config(tree)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error)
    else:
        assert parse_config(yaml.safe_load(config.to_yaml())) == config


@settings(deadline=None)
@given(
    key=st.sampled_from(["steps", "name", "optimizer.learning_rate", "environment.options.x", "model", "a.b", ""])
    | st.text(max_size=8),
    value=st.text(max_size=12) | values.map(lambda value: yaml.safe_dump(value, default_flow_style=True)),
)
def test_any_override_parses_or_is_a_user_error(key: str, value: str) -> None:
    try:
        config = load_config("base", [f"{key}={value}"])
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_the_configuration_page_explains_every_key():
    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert not [line for line in page.splitlines() if line.endswith("|  |")]
