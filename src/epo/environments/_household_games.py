"""One generated household game: draws it in an ALFRED floor plan, writes its PDDL, proves it winnable.

The alfworld package ships, for all 120 ALFRED scenes, the receptacles with the pose to reach each and the types of the
objects. What is drawn here is the task, its targets, and where every object lies; rules and wording are ALFWorld's own.

Legend: an ALFRED id is `Type|+xx.xx|+yy.yy|+zz.zz` (basins: `Sink|..|SinkBasin`), a pose `loc|x|z|rotation|horizon`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from epo.environments._textworld_memo import contained
from epo.errors import EnvironmentFailure

# Task type -> (property the object must have, receptacle that changes it, verb).
_STATIONS = {
    "pick_clean_then_place_in_recep": ("Cleanable", "SinkBasin", "clean"),
    "pick_heat_then_place_in_recep": ("Heatable", "Microwave", "heat"),
    "pick_cool_then_place_in_recep": ("Coolable", "Fridge", "cool"),
}
# A lamp can be used only where it stands in a receptacle; these are where ALFRED's scenes have them.
_LAMP_HOMES = {
    "DeskLamp": ("Desk", "SideTable", "Dresser", "Shelf", "CoffeeTable", "DiningTable"),
    "FloorLamp": ("SideTable", "ArmChair", "Sofa", "Desk", "Dresser", "Bed", "CoffeeTable", "Shelf"),
}
_PROPERTIES = ("Cleanable", "Heatable", "Coolable", "Sliceable", "Toggleable")
_DRAWS_PER_GAME = 400


@dataclass(frozen=True, kw_only=True)
class Room:
    """A floor plan: receptacles by id with the pose to reach each, and the object types of the scene."""

    poses: Mapping[str, str]
    object_types: tuple[str, ...]
    start: str
    """The agent's first pose; no receptacle's, so that an episode opens with the view of the room."""


@dataclass(frozen=True, kw_only=True)
class Game:
    """One drawn game: everything that decides its text."""

    task_type: str
    scene: int
    target: str
    """Type of the object asked for."""
    parent: str
    """Type of the receptacle to put it in; empty for look_at_obj_in_light."""
    lamp: str
    """Type of the lamp; empty but for look_at_obj_in_light."""
    description: str
    poses: Mapping[str, str]
    """Receptacle id -> pose."""
    placed: Mapping[str, str]
    """Object id -> receptacle id."""
    problem: str
    """The PDDL problem."""

    @property
    def folder(self) -> str:
        """Task and trial folder, named as ALFRED does."""
        name = f"{self.task_type}-{self.target}-None-{self.parent or self.lamp}-{self.scene}"
        return f"{name}/trial_T{hashlib.sha256(self.problem.encode()).hexdigest()[:12]}"

    @property
    def content(self) -> tuple[Any, ...]:
        """Equal for games that differ in coordinates only, which the agent never reads."""
        lying = tuple(sorted((o.split("|")[0], r) for o, r in self.placed.items()))
        return self.task_type, self.scene, self.target, self.parent, self.lamp, tuple(sorted(self.poses)), lying


def sample_game(
    task_type: str, scene: int, rng: random.Random, *, max_copies: int, density: float, max_receptacles: int | None
) -> Game | None:
    """Draw one game in a floor plan, or None where the scene lacks what the task needs."""
    _, goals = alfred()
    room, can_hold = load_room(scene), _can_hold()
    goal = _sample_goal(task_type, room, rng)
    if goal is None:
        return None
    target, parent, lamp = goal
    poses = _trim(room, task_type, goal, rng, max_receptacles)

    placed: dict[str, str] = {}

    def put(object_type: str, homes: list[str]) -> None:
        home = rng.choice(homes)
        x, y, z = (float(v) for v in home.split("|")[1:4])
        while True:
            at = _coordinates(x + rng.uniform(-0.4, 0.4), y + 0.05, z + rng.uniform(-0.4, 0.4))
            if f"{object_type}|{at}" not in placed:
                placed[f"{object_type}|{at}"] = home
                return

    for object_type in room.object_types:
        if object_type in _LAMP_HOMES:
            homes = [r for r in sorted(poses) if receptacle_type(r) in _LAMP_HOMES[object_type]]
            if homes:
                put(object_type, homes)
        elif any(object_type in types for types in can_hold.values()):
            if object_type != target and rng.random() >= density:
                continue
            homes = [r for r in sorted(poses) if object_type in can_hold[receptacle_type(r)]]
            copies = rng.randint(1, max_copies)
            if object_type == target:
                homes = [r for r in homes if receptacle_type(r) != parent]  # the goal must not hold at the start
                copies = max(copies, 2) if task_type == "pick_two_obj_and_place" else copies
            for _ in range(copies if homes else 0):
                put(object_type, homes)

    description = rng.choice(goals[task_type]["templates"]).format(
        obj=target.lower(), recep=parent.lower(), toggle=lamp.lower()
    )
    goal_pddl = goals[task_type]["pddl"].format(obj=target, recep=parent, toggle=lamp).strip()
    return Game(
        task_type=task_type,
        scene=scene,
        target=target,
        parent=parent,
        lamp=lamp,
        description=description,
        poses=poses,
        placed=placed,
        problem=_pddl_problem(poses, placed, room.start, goal_pddl),
    )


@lru_cache(maxsize=1)
def alfred() -> tuple[Any, Any]:
    """ALFRED's constants and its goal library (PDDL goals and description templates by task type)."""
    with contained():
        from alfworld.gen import constants, goal_library
    return constants, goal_library.gdict


@lru_cache(maxsize=1)
def _can_hold() -> dict[str, tuple[str, ...]]:
    """Type of receptacle one can walk to -> types of objects it can hold, sorted (the package has sets)."""
    constants, _ = alfred()
    fixed = constants.RECEPTACLES - constants.MOVABLE_RECEPTACLES_SET
    return {
        receptacle: tuple(sorted(o for o in objects if not o.endswith("Sliced")))
        for receptacle, objects in sorted(constants.VAL_RECEPTACLE_OBJECTS.items())
        if receptacle in fixed
    }


def receptacle_type(receptacle: str) -> str:
    """`Drawer|x|y|z` -> Drawer; `Sink|x|y|z|SinkBasin` -> SinkBasin."""
    parts = receptacle.split("|")
    return parts[4] if len(parts) == 5 else parts[0]


def _coordinates(x: float, y: float, z: float) -> str:
    return "|".join(f"{v:+06.2f}" for v in (x, y, z))


@lru_cache(maxsize=128)
def load_room(scene: int) -> Room:
    """The floor plan `scene` as the alfworld package ships it."""
    import numpy as np

    with contained():
        import alfworld.gen
    layouts, can_hold = Path(alfworld.gen.__path__[0]) / "layouts", _can_hold()
    recorded = json.loads((layouts / f"FloorPlan{scene}-openable.json").read_text(encoding="utf-8"))
    poses = {
        receptacle: _pose(x, z, round(rotation / 90) % 4, round(horizon))
        for receptacle, (x, z, rotation, horizon) in recorded.items()
        if receptacle_type(receptacle) in can_hold
    }
    types = sorted(json.loads((layouts / f"FloorPlan{scene}-objects.json").read_text(encoding="utf-8")))
    floor = [tuple(map(float, point)) for point in np.load(layouts / f"FloorPlan{scene}-layout.npy")]
    # Some receptacles (stove burners, toasters, some tables) are listed without a pose: it is drawn once per scene.
    rng = random.Random(scene)
    recorded_types = {receptacle_type(r) for r in poses}
    for missing in (t for t in types if t in can_hold and t not in recorded_types):
        for _ in range(4 if missing == "StoveBurner" else 1):
            x, z = rng.choice(floor)
            # A basin's id starts with the fixture it is in, or the engine would name it "sinkbasinbasin".
            head, tail = (missing.removesuffix("Basin"), f"|{missing}") if missing.endswith("Basin") else (missing, "")
            receptacle = f"{head}|{_coordinates(x + 0.5, 0.9 + rng.random() / 5, z + 0.5)}{tail}"
            poses[receptacle] = _pose(x, z, rng.randrange(4), rng.choice((0, 15, 30, 45, 60)))
    x, z = rng.choice(floor)
    taken = set(poses.values())
    start = next(p for h in (30, 7, 8, 9) for r in range(4) if (p := _pose(x, z, r, h)) not in taken)
    return Room(poses=poses, object_types=tuple(types), start=start)


def _pose(x: float, z: float, rotation: int, horizon: int) -> str:
    return f"loc|{round(x / 0.25)}|{round(z / 0.25)}|{rotation}|{horizon}"


def _sample_goal(task_type: str, room: Room, rng: random.Random) -> tuple[str, str, str] | None:
    """(object type, parent receptacle type, lamp type), all of them in the room, or None."""
    constants, _ = alfred()
    can_hold = _can_hold()
    present = sorted({receptacle_type(r) for r in room.poses})
    movable = [o for o in room.object_types if o not in _LAMP_HOMES]
    if task_type == "look_at_obj_in_light":
        lamps = [t for t in _LAMP_HOMES if t in room.object_types and any(r in present for r in _LAMP_HOMES[t])]
        objects = [o for o in movable if any(o in can_hold[r] for r in present)]
        return (rng.choice(objects), "", rng.choice(lamps)) if lamps and objects else None
    needed, station, _ = _STATIONS.get(task_type, (None, None, None))
    if station is not None and station not in present:
        return None
    parents: dict[str, list[str]] = {}
    for o in movable:
        homes = [r for r in present if o in can_hold[r]]
        if needed is None or o in constants.VAL_ACTION_OBJECTS[needed]:
            fitting = [r for r in homes if r != station and len(homes) > 1]  # it must lie somewhere else at first
            if fitting:
                parents[o] = fitting
    if not parents:
        return None
    target = rng.choice(sorted(parents))  # object first, so that no type with many parents dominates
    return target, rng.choice(parents[target]), ""


def _trim(
    room: Room, task_type: str, goal: tuple[str, str, str], rng: random.Random, limit: int | None
) -> dict[str, str]:
    """At most `limit` receptacles of the room: one for each thing the task needs, the others at random."""
    if limit is None or len(room.poses) <= limit:
        return dict(room.poses)
    target, parent, lamp = goal
    can_hold = _can_hold()
    needs = [
        lambda r: r == parent,
        lambda r: r != parent and target in can_hold[r],
        lambda r: task_type in _STATIONS and r == _STATIONS[task_type][1],
        lambda r: r in _LAMP_HOMES.get(lamp, ()),
    ]
    kept: list[str] = []
    for fits in needs:
        choices = [r for r in sorted(room.poses) if fits(receptacle_type(r))]
        if choices and not any(r in kept for r in choices):
            kept.append(rng.choice(choices))
    kept += rng.sample([r for r in sorted(room.poses) if r not in kept], limit - len(kept))
    return {r: room.poses[r] for r in sorted(kept)}


def _mangle(text: str) -> str:
    """ALFWorld's spelling of ALFRED ids in PDDL; `#` stands for a PDDL hyphen."""
    table = {"-": "_minus_", "#": "-", "|": "_bar_", "+": "_plus_", ".": "_dot_", ",": "_comma_"}
    return re.sub(r"[-#|+.,]", lambda match: table[match.group()], text)


def _pddl_problem(poses: Mapping[str, str], placed: Mapping[str, str], start: str, goal: str) -> str:
    constants, _ = alfred()
    can_hold = _can_hold()
    receptacles, objects = sorted(poses), sorted(placed)
    type_of = {o: o.split("|")[0] for o in objects}
    object_types = sorted(set(type_of.values()))
    receptacle_types = sorted({receptacle_type(r) for r in receptacles})
    facts = ["(= (total#cost) 0)"]
    facts += [f"(receptacleType {r} {receptacle_type(r)}Type)" for r in receptacles]
    facts += [f"(receptacleAtLocation {r} {poses[r]})" for r in receptacles]
    facts += [f"(openable {r})" for r in receptacles if receptacle_type(r) in constants.OPENABLE_CLASS_SET]
    facts += [f"(atLocation agent1 {start})"]
    for o in objects:
        kind, home = type_of[o], placed[o]
        facts += [f"(objectType {o} {kind}Type)", f"(objectAtLocation {o} {poses[home]})", f"(inReceptacle {o} {home})"]
        facts += [f"(pickupable {o})"] if kind not in _LAMP_HOMES else []
        facts += [f"(isReceptacleObject {o})"] if kind in constants.MOVABLE_RECEPTACLES_SET else []
        facts += [f"({p.lower()} {o})" for p in _PROPERTIES if kind in constants.VAL_ACTION_OBJECTS[p]]
    facts += [f"(canContain {r}Type {o}Type)" for r in receptacle_types for o in object_types if o in can_hold[r]]
    names = ["agent1 # agent"]
    names += [f"{o} # object" for o in objects] + [f"{r} # receptacle" for r in receptacles]
    names += [f"{pose} # location" for pose in sorted({*poses.values(), start})]
    names += [f"{t}Type # otype" for t in object_types] + [f"{t}Type # rtype" for t in receptacle_types]
    indent = "\n        "
    body = f"(:objects{indent}{indent.join(names)}{indent})\n\n(:init{indent}{indent.join(facts)}{indent})\n{goal}\n"
    return "(define (problem plan_household)\n(:domain alfred)\n" + _mangle(body)  # the goal closes the definition


def walkthrough(game: Game, name: Callable[[str], str]) -> list[str]:
    """The commands that win `game`, straight from where things lie. `name` turns an id into the engine's words."""
    opened: set[str] = set()
    here: str | None = None
    plan: list[str] = []

    def go(receptacle: str, *, opening: bool) -> None:
        nonlocal here
        if here != game.poses[receptacle]:  # receptacles may share a pose: then one is there already
            plan.append(f"go to {name(receptacle)}")
            here = game.poses[receptacle]
        if opening and closed(receptacle):
            plan.append(f"open {name(receptacle)}")
            opened.add(receptacle)

    def closed(receptacle: str) -> bool:
        return receptacle_type(receptacle) in alfred()[0].OPENABLE_CLASS_SET and receptacle not in opened

    def of_type(ids: Mapping[str, str], wanted: str, kind: Callable[[str], str]) -> list[str]:
        return [i for i in sorted(ids) if kind(i) == wanted]

    def object_type(o: str) -> str:
        return o.split("|")[0]

    targets = of_type(game.placed, game.target, object_type)
    targets.sort(key=lambda o: closed(game.placed[o]))  # what lies in the open first
    for target in targets[: 2 if game.task_type == "pick_two_obj_and_place" else 1]:
        go(game.placed[target], opening=True)
        plan.append(f"take {name(target)} from {name(game.placed[target])}")
        if game.task_type == "look_at_obj_in_light":
            lamp = of_type(game.placed, game.lamp, object_type)[0]
            go(game.placed[lamp], opening=False)
            plan.append(f"use {name(lamp)}")
            break
        if game.task_type in _STATIONS:
            _, station, verb = _STATIONS[game.task_type]
            place = of_type(game.poses, station, receptacle_type)[0]
            go(place, opening=False)
            plan.append(f"{verb} {name(target)} with {name(place)}")
        parent = of_type(game.poses, game.parent, receptacle_type)[0]
        go(parent, opening=True)
        plan.append(f"move {name(target)} to {name(parent)}")
    return plan


def write_game(split_folder: Path, game: Game, engine: Any) -> tuple[Path, int]:
    """Replay the walkthrough of `game`, then write its files. Returns the game file and the walkthrough's length.

    Raises:
        EnvironmentFailure: the walkthrough does not win, which is a fault of the generator.
    """
    with contained():
        from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
    data: dict[str, Any] = {
        "pddl_domain": Path(ALFRED_PDDL_PATH).read_text(encoding="utf-8"),
        "grammar": Path(ALFRED_TWL2_PATH).read_text(encoding="utf-8").replace("UNKNOWN GOAL", game.description),
        "pddl_problem": game.problem,
    }
    engine.load(data)
    engine.reset()
    entities = engine.unwrapped._entity_infos
    plan = walkthrough(game, lambda i: entities[_mangle(i).lower()].name)
    won = [bool(engine.step(command)[0]["won"]) for command in plan]
    if won != [False] * (len(plan) - 1) + [True]:
        raise EnvironmentFailure(f"the walkthrough of {game.folder} does not win with its last step: {plan}")

    folder = split_folder / game.folder
    folder.mkdir(parents=True)
    path = folder / "game.tw-pddl"
    path.write_text(json.dumps({**data, "solvable": True, "walkthrough": plan}), encoding="utf-8")
    goal = {"object_target": game.target, "parent_target": game.parent, "toggle_target": game.lamp}
    trajectory = {
        "task_type": game.task_type,
        "task_id": folder.name,
        "pddl_params": {**goal, "mrecep_target": "", "object_sliced": False},
        "scene": {"scene_num": game.scene, "floor_plan": f"FloorPlan{game.scene}"},
        "plan": {"high_pddl": [], "low_actions": []},
        "turk_annotations": {"anns": [{"task_desc": f"{game.description}.", "high_descs": []}]},
        "generated": True,
    }
    (folder / "traj_data.json").write_text(json.dumps(trajectory), encoding="utf-8")
    return path, len(plan)
