"""Targets: model directories."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz_cases
from fuzz_guard import bounded_memory
from fuzz_target import Throw, Verdict, target

from epo.training.policy import Policy, load_policy
from epo.training.session import quiet_libraries


def tiny_policy() -> tuple[Policy, Any]:
    from epo.config import ModelConfig
    from epo.training.tiny import build_model, build_tokenizer

    tiny = {"vocabulary_size": 300, "hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32}
    config = ModelConfig.model_validate({"max_context": 512, "device": "cpu", "tiny": tiny})
    tokenizer = build_tokenizer(["open the door", "go to the kitchen <think> <action>"] * 4, vocabulary_size=300)
    return Policy(build_model(tokenizer, config, seed=0).eval(), tokenizer, max_context=512), config


@target("model directories", bounded=15, full=300, seconds=60)
def model_directories(folder: Path) -> Iterator[Throw]:
    policy, config = tiny_policy()
    whole, model = folder / "whole-model", folder / "model"
    policy.save(whole)
    names = sorted(file.name for file in whole.iterdir())
    foreign = ["bert", "gpt2", "t5", "mamba", "whisper", "llama4", "qwen3_moe", "vit", "nothing", "auto", "../x", ""]
    templates = [
        "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ 1/0 }}",
        "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages[7].content }}",
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{%",
        "",
        "constant",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ]

    def damage(rng: random.Random) -> None:
        kind = rng.randrange(9)
        if kind == 0:
            file = model / rng.choice(names)
            file.write_bytes(fuzz_cases.mutated_bytes(rng, file.read_bytes()))
        elif kind == 1:
            weights = model / "model.safetensors"
            weights.write_bytes(fuzz_cases.mutated_tensors(rng, weights.read_bytes()))
        elif kind == 2:
            name = rng.choice([n for n in names if n.endswith(".json")])
            tree = fuzz_cases.mutated_tree(rng, json.loads((model / name).read_bytes()), changes=rng.randrange(1, 4))
            (model / name).write_bytes(fuzz_cases.json_text(rng, tree))
        elif kind == 3:
            tree = json.loads((model / "config.json").read_bytes())
            tree["model_type"] = rng.choice(foreign)
            if rng.random() < 0.5:
                del tree["architectures"]
            (model / "config.json").write_text(json.dumps(tree))
        elif kind == 4:
            tree = json.loads((model / "config.json").read_bytes())
            key = rng.choice([k for k, v in tree.items() if isinstance(v, int)])
            tree[key] = rng.choice([-1, 0, 10**6, 10**12, 10**30, 0.5, "8", None])
            (model / "config.json").write_text(json.dumps(tree))
        elif kind == 5:
            (model / "chat_template.jinja").write_text(rng.choice(templates))
        elif kind == 6:
            evil = "import os\nopen('PWNED', 'w')\nos.system('touch PWNED')\n"
            for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
                (model / f"{name}.py").write_text(evil)
            auto = {
                "AutoConfig": "configuration_evil.EvilConfig",
                "AutoModelForCausalLM": "modeling_evil.EvilModel",
                "AutoTokenizer": ["tokenization_evil.EvilTokenizer", None],
            }
            for name in rng.choice(
                [["config.json"], ["tokenizer_config.json"], ["config.json", "tokenizer_config.json"]]
            ):
                tree = json.loads((model / name).read_bytes()) | {"auto_map": auto}
                if rng.random() < 0.5:
                    tree |= {"model_type": "evil", "tokenizer_class": "EvilTokenizer"}
                (model / name).write_text(json.dumps(tree))
        elif kind == 7:
            file = model / rng.choice(names)
            file.unlink()
            links = [file, Path("/dev/zero"), Path("/etc/passwd"), Path("/nowhere"), model, whole / file.name]
            draw = rng.random()
            if draw < 0.2:
                file.mkdir()
            elif draw < 0.4:
                os.mkfifo(file)
            elif draw < 0.8:
                file.symlink_to(rng.choice(links))
        else:
            shards = {
                "lm_head.weight": rng.choice(["../whole-model/model.safetensors", "/etc/passwd", "x", "", 7, None])
            }
            index = {"metadata": {}, "weight_map": rng.choice([shards, [], None, "x", {}])}
            (model / "model.safetensors.index.json").write_text(json.dumps(index))

    quiet_libraries()

    def throw(rng: random.Random) -> Verdict:
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(whole, model)
        for _ in range(rng.randrange(1, 3)):
            if not all(file.is_file() for file in model.iterdir()):  # what opens a pipe waits
                break
            try:
                damage(rng)
            except (OSError, ValueError, KeyError, AttributeError, IndexError):  # damaged already
                continue
        policy = load_policy(str(model), config)
        policy.chat.first_prompt(fuzz_cases.text(rng))
        return "accepted"

    with bounded_memory(16):
        yield throw
