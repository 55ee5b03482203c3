"""The records that travel between stages. Imports nothing of ours and no torch, so environment workers stay light.

Legend for array suffixes: _T tokens of one row, in order; _R tokens of one response; _M most probable tokens.

Example::

    Task -> Observation -> Turn, Turn, ... -> Trajectory -> TrajectoryGroup -> PackedBatch
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:  # names of types alone: `epo --help` answers without loading numpy
    import numpy as np
    from numpy.typing import NDArray

IntArray: TypeAlias = "NDArray[np.int64]"
FloatArray: TypeAlias = "NDArray[np.float32]"
BoolArray: TypeAlias = "NDArray[np.bool_]"


class Alternatives(NamedTuple):
    """What could have been drawn: the M most probable tokens at each of R places, most probable first."""

    ids_R_M: IntArray
    logprobs_R_M: FloatArray
    """At training temperature, natural log."""


class TokenCounts(NamedTuple):
    """What one turn took, as a server counts that tells no ids."""

    prompt: int
    response: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One thing to do, named so that it can be done again.

    Example::

        Task(suite="scienceworld", id="find-animal/17", split="train", seed=0, goal="find-animal")
    """

    suite: str
    id: str
    """Unique inside its suite; enough, together with `seed`, to reset the environment to the same start."""
    split: str
    """`train`, `iid` or `ood`; a suite may define more."""
    seed: int = 0
    goal: str = ""
    """A short name of what is asked (the task type). Reports group by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What the agent reads before it acts."""

    text: str
    admissible_actions: tuple[str, ...] | None = None
    """What may be done now, as the environment tells it; None when it does not tell."""
    goal: str | None = None
    """The instruction in words. Set on the first observation of an episode only; `text` does not repeat it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What an environment answers to an action: Gymnasium's five-tuple, text only."""

    observation: Observation
    reward: float
    terminated: bool
    """The task itself ended the episode."""
    truncated: bool = False
    """A limit ended the episode."""
    success: bool = False
    """Full success by the environment's own definition. Only ever true with `terminated`."""
    score: float = 0.0
    """Progress so far in [0, 1]; 1 means full success."""
    understood: bool = True
    """False when the environment could not interpret the action at all."""


class StopReason(StrEnum):
    """Why a trajectory ended. Logged as one share per reason under `stop/<reason>`."""

    SUCCESS = "success"
    FAILURE = "failure"
    MAX_TURNS = "max_turns"
    CONTEXT_OVERFLOW = "context_overflow"
    ENVIRONMENT_ERROR = "environment_error"
    SERVER_ERROR = "server_error"
    """A server whose model is evaluated left a request without an answer. Never in training."""

    @property
    def is_error(self) -> bool:
        """True when the environment or a server, not the agent, ended the episode: its outcome teaches nothing."""
        return self in (StopReason.ENVIRONMENT_ERROR, StopReason.SERVER_ERROR)


class ResponseParts(NamedTuple):
    """Which tokens of a response are its thought and which its action, first and end as for slices. Tags, and tokens
    that hold a piece of one, belong to neither; None for a part whose tags are not both there."""

    thought: tuple[int, int] | None
    action: tuple[int, int] | None


@dataclass(kw_only=True, slots=True)
class Turn:
    """One observation-action exchange, with the exact tokens the policy read and wrote.

    `prompt_ids` and `response_ids` are what the sampler saw and drew; they are never re-encoded from text. With a model
    behind a server, which tells no ids, all arrays are empty.
    """

    prompt_ids: IntArray
    """[P] everything the policy read before it answered."""
    response_ids: IntArray
    """[R] what it drew, the end-of-turn token included when it drew one. Every one of them is trained."""
    logprobs: FloatArray
    """[R] log-probabilities under the sampling policy at training temperature, natural log."""
    entropy: FloatArray
    """[R] full-vocabulary entropy at training temperature, in nats: the sampler's, or the learner's where that computes
    it anew."""
    learner_logprobs: FloatArray | None = None
    """[R] the log-probabilities by the learner's own numerics, with the weights that the update began with; None where
    `logprobs` serve for it too (`sampler.old_logprobs`)."""
    alternatives: Alternatives | None = None
    """For people; None where none were asked for (`record.alternatives`)."""
    advantages: FloatArray | None = None
    """[R] what the learner weighed the tokens with; None where it did not train on the turn."""
    ratios: FloatArray | None = None
    """[R] probability by the policy when the learner last saw the tokens in its update / by the policy that drew them;
    None where it did not train on the turn."""
    observation: str
    response: str
    action: str
    """What was sent to the environment."""
    parts: ResponseParts | None = None
    """Of the response; None where its format has no parts (`agent.format: action`)."""
    is_valid: bool
    """The response had the required format."""
    understood: bool = True
    """The environment could interpret the action."""
    environment_reward: float = 0.0
    penalty: float = 0.0
    """Taken off for an invalid response."""
    score: float = 0.0
    dropped_turns: int = 0
    """Earlier turns that `prompt_ids` leaves out for lack of room (`agent.overflow`)."""
    drifted: bool = False
    """Encoding the text of `response_ids` again gives other ids. For information: nothing here is encoded again."""
    policy_version: int = 0
    """Of the weights that drew `response_ids` (`Policy.version`)."""
    counts: TokenCounts | None = None
    """Of a turn without ids, where the server tells them."""

    def __post_init__(self) -> None:
        length = len(self.response_ids)
        for name in ("logprobs", "entropy", "learner_logprobs", "advantages", "ratios"):
            values = getattr(self, name)
            if values is not None and len(values) != length:
                raise ValueError(f"a turn's {name} must be one per response token ({length}), got {len(values)}")

    @property
    def reward(self) -> float:
        """What this turn earned."""
        return self.environment_reward - self.penalty


@dataclass(kw_only=True, slots=True)
class Trajectory:
    """One whole episode."""

    task: Task
    instruction: str | None = None
    """What was asked, in words, where the environment says so (`Observation.goal`)."""
    turns: list[Turn] = field(default_factory=list[Turn])
    stop_reason: StopReason = StopReason.MAX_TURNS
    success: bool = False
    score: float = 0.0
    error: str | None = None
    """What the environment or the server said when it failed; which prompt found no room, for
    `StopReason.CONTEXT_OVERFLOW`."""
    restarts: int = 0
    """How often the environment died and the episode was replayed into a new one, or its rollout worker was lost and it
    was played anew elsewhere."""

    @property
    def total_reward(self) -> float:
        return sum(turn.reward for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        """Number of sampled (trained) tokens."""
        return sum(len(turn.response_ids) for turn in self.turns)


@dataclass(kw_only=True, slots=True)
class TrajectoryGroup:
    """Trajectories of the same task. Group-relative advantages never look outside it."""

    task: Task
    trajectories: list[Trajectory]

    @property
    def survivors(self) -> list[Trajectory]:
        """The trajectories that can be trained on: at least one turn, and no environment error."""
        return [t for t in self.trajectories if t.turns and not t.stop_reason.is_error]


@dataclass(kw_only=True, slots=True)
class PackedRow:
    """One training row: a token sequence in which some tokens are trained.

    Example, two turns merged (prompts P, observation O, responses A)::

        token_ids    = P P P A A O O A A
        trained      = 0 0 0 1 1 0 0 1 1
        turn_ids     = - - - 0 0 - - 1 1      (-1 where not trained)
    """

    token_ids_T: IntArray
    trained_T: BoolArray
    turn_ids_T: IntArray
    logprobs_T: FloatArray
    """Sampling log-probabilities; 0 where not trained."""
    trajectory_id: int

    def __post_init__(self) -> None:
        for name in ("trained_T", "turn_ids_T", "logprobs_T"):
            if len(getattr(self, name)) != len(self.token_ids_T):
                raise ValueError(
                    f"a row's {name} must be one per token ({len(self.token_ids_T)}), got {len(getattr(self, name))}"
                )

    def __len__(self) -> int:
        return len(self.token_ids_T)


@dataclass(kw_only=True, slots=True)
class PackedBatch:
    """All training rows of one RL step. Row order follows trajectory order, then turn order."""

    rows: list[PackedRow]
    num_trajectories: int

    @property
    def num_tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def num_trained(self) -> int:
        return sum(int(row.trained_T.sum()) for row in self.rows)
