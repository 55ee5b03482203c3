"""Targets: run folders, as those see them who look at runs."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import fuzz_cases
import yaml
from fuzz_target import Throw, Verdict, dump_yaml, epo, target


@target("run folders, read by `epo show`, `report`, `compare` and `watch`", bounded=25, full=600, seconds=60)
def run_folders(folder: Path) -> Iterator[Throw]:
    import viewer_run

    from epo.reporting.pages.watch import WatchedRuns

    vocabulary = viewer_run.Vocabulary()
    records = {step: viewer_run.make_records(vocabulary, step=step, groups=1, members=2) for step in (1, 2)}
    whole = viewer_run.write_run(folder / "whole", records, vocabulary.pieces)
    (whole / "provenance.json").write_text('{"packages": {"torch": "2"}}')
    (whole / "summary.json").write_text('{"finished": true, "halted": null, "wall_seconds": 1.5}')
    other = Path(shutil.copytree(whole, folder / "other"))
    run = folder / "run"
    names = sorted(str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file())

    def damage(rng: random.Random, name: str) -> None:
        file = run / name
        data, draw = file.read_bytes(), rng.random()
        if draw < 0.1:
            file.unlink()
            if rng.random() < 0.5:
                file.mkdir()
            return
        if draw < 0.35:
            file.write_bytes(fuzz_cases.mutated_bytes(rng, data))
        elif draw < 0.45:
            file.write_bytes(fuzz_cases.json_text(rng, fuzz_cases.value(rng)) + b"\n")
        elif name.endswith(".yaml"):
            tree = fuzz_cases.mutated_tree(rng, yaml.safe_load(data))
            file.write_bytes(fuzz_cases.yaml_text(rng, dump_yaml, tree))
        elif name.endswith(".jsonl"):
            lines = data.splitlines()
            place = rng.randrange(len(lines))
            tree = fuzz_cases.mutated_tree(rng, json.loads(lines[place]), changes=rng.randrange(1, 3))
            lines[place] = fuzz_cases.json_text(rng, tree)
            file.write_bytes(b"\n".join(lines) + b"\n")
        else:
            tree = fuzz_cases.mutated_tree(rng, json.loads(data))
            file.write_bytes(fuzz_cases.json_text(rng, tree))

    def throw(rng: random.Random) -> Verdict:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        for name in rng.sample(names, rng.randrange(1, 3)):
            damage(rng, name)
        reader = rng.choice(["show", "list", "search", "json", "report", "compare", "watch"])
        if reader == "show":
            step, row = rng.choice(["1", "2"]), rng.choice(["0", "1"])
            by = rng.choice(["entropy", "logprob", "advantage", "ratio"])
            extra = rng.sample(["--mask", "--whole", "--top=5"], rng.randrange(3))
            epo("show", str(run), "--step", step, "--row", row, "--by", by, "--pager", "off", *extra)
        elif reader == "list":
            epo(
                "show",
                str(run),
                "--pager",
                "off",
                *rng.sample(["--success", "--invalid", "--goal=a"], rng.randrange(3)),
            )
        elif reader == "search":
            epo("show", str(run), "--search", "door", "--pager", "off")
        elif reader == "json":
            epo("show", str(run), "--json")
        elif reader == "report":
            epo("report", str(run), "--out", str(folder / "report.html"))
        elif reader == "compare":
            epo("compare", str(other), str(run), *rng.choice([[], ["--json"], ["--csv"]]))
        else:
            watched = WatchedRuns([run, other])
            json.dumps(watched.page(), allow_nan=False)
            shutil.copy(whole / "metrics.jsonl", run / "metrics.jsonl") if rng.random() < 0.5 else None
            json.dumps(watched.page_after(["x", "y.1.2.3"]), allow_nan=False)
            for step in (1, 2):
                json.loads(watched.trajectories(0, step))
            watched.search(0, "door")
        return "accepted"

    yield throw
