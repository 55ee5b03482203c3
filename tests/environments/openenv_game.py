"""A small game on a real OpenEnv server: `python openenv_game.py [SESSIONS]` prints its port and serves until killed.

Turn a dial to the number that the note names, then open the safe. Needs the package openenv; run as a script.
"""

from __future__ import annotations

import random
import socket
import sys
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from pydantic import Field

PLACES = 5


class DialAction(Action):
    command: str = Field(max_length=40)


class DialObservation(Observation):
    text: str
    legal: list[str]
    note: dict[str, Any]
    opened: bool = False


class Dial(Environment[DialAction, DialObservation, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, places: int = PLACES, **options: Any
    ) -> DialObservation:
        self.places = places
        self.dial, self.number = random.Random(seed).sample(range(1, places + 1), 2)
        return self.observe(f"The dial is at {self.dial} and must be at {self.number}.")

    def step(self, action: DialAction, timeout_s: float | None = None, **options: Any) -> DialObservation:
        word = action.command.strip()
        if word == "smash":
            raise RuntimeError("the dial is broken")
        if word == "open":
            opened = self.dial == self.number
            return self.observe("It opens." if opened else "An alarm rings.", opened=opened, done=True)
        if word in ("up", "down"):
            self.dial = min(self.places, max(1, self.dial + (1 if word == "up" else -1)))
        return self.observe(f"The dial is at {self.dial} and must be at {self.number}.")

    def observe(self, text: str, *, opened: bool = False, done: bool = False) -> DialObservation:
        return DialObservation(
            text=text,
            legal=["up", "down", "open"],
            note={"number": self.number},
            opened=opened,
            done=done,
            reward=2.0 if opened else 0.0,
        )

    @property
    def state(self) -> State:
        return State()


def main() -> None:
    sessions = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    app = create_fastapi_app(Dial, DialAction, DialObservation, max_concurrent_envs=sessions)
    listener = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
