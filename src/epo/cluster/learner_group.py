"""The driver's side of a learner of several ranks, which Ray Train starts, places and watches."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from epo.cluster.events import EventLog
from epo.cluster.file_meeting import FileMeeting
from epo.cluster.learner_rank import Mailbox, RankSettings, work
from epo.cluster.weights import Files, Weights, write_files
from epo.config import Config
from epo.errors import LearnerLost, UserError
from epo.training.skipped import SkippedBatch
from epo.types import TrajectoryGroup

_POLL_SECONDS = 0.5
"""How often to look whether the group still lives while an answer is waited for."""


class LearnerGroup:
    """A learner (`epo.training.trainer.StepLearner`) whose work ranks share.

    Every call is made on all ranks. One that is lost takes the group with it, for each holds a part of the weights; the
    next call, or the one that is waited for, then raises `LearnerLost`.

    Args:
        model: files of the policy to go on with.
        start: files of the policy that training began with; None where it is the same, or nothing refers to it.
        is_local: all ranks are on this machine, so none needs to listen for others.

    Raises:
        UserError: the ranks do not start in time; from the first call.
    """

    def __init__(self, config: Config, *, model: Files, start: Files | None, events: EventLog, is_local: bool) -> None:
        cluster = config.cluster
        self._events = events
        self._config = cluster
        self.skipped: list[SkippedBatch] = []
        self._seconds: dict[str, float] = {}
        self._number = 0
        self._error: BaseException | None = None
        mailbox: Any = ray.remote(Mailbox).options(num_cpus=0)
        self._mailbox: Any = mailbox.remote()
        settings = RankSettings(
            config=config, model=ray.put(model), start=None if start is None else ray.put(start), mailbox=self._mailbox
        )
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_seconds)
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        self._folder = tempfile.TemporaryDirectory()
        is_on_gpu = cluster.learner_gpus > 0
        resources = {"CPU": cluster.learner_cpus} | ({"GPU": cluster.learner_gpus} if is_on_gpu else {})
        torch_config = TorchConfig(backend="nccl" if is_on_gpu else "gloo", timeout_s=int(cluster.learner_seconds))
        if is_local:
            torch_config = FileMeeting(**torch_config.to_dict(), folder=self._folder.name)
        trainer = TorchTrainer(
            lambda: work(settings),
            scaling_config=ScalingConfig(
                num_workers=cluster.learners,
                use_gpu=is_on_gpu,
                resources_per_worker=resources,
                placement_strategy="SPREAD",
            ),
            torch_config=torch_config,
            # What was learnt since the newest checkpoint is gone with a rank: the trainer goes back to it.
            run_config=RunConfig(storage_path=self._folder.name, failure_config=FailureConfig(max_failures=0)),
        )
        self._thread = threading.Thread(target=self._fit, args=(trainer,), daemon=True)
        self._thread.start()
        self._reference: str | None = None
        self._newest: Weights | None = None

    def _described(self) -> Weights:
        """Waits until the ranks have started, if nobody has done so: others may start meanwhile."""
        if self._newest is None:
            described = self._call("describe", limit=self._config.start_seconds)
            self._reference, self._newest = described["reference"], described["weights"]
        assert self._newest is not None
        return self._newest

    def weights(self) -> Weights:
        """Those of the moment."""
        return self._described()

    def rescore(self, groups: Sequence[TrajectoryGroup]) -> Sequence[TrajectoryGroup]:
        return self._call("rescore", ray.put(list(groups)))

    def input_dependence(self, groups: Sequence[TrajectoryGroup], *, step: int) -> dict[str, float]:
        return self._call("input_dependence", ray.put(list(groups)), step)

    def update(self, groups: Sequence[TrajectoryGroup], *, step: int) -> dict[str, float]:
        answer = self._call("update", ray.put(list(groups)), step)
        metrics, notes, self.skipped, self._newest, self._seconds = answer
        turns = [turn for group in groups for t in group.trajectories for turn in t.turns]
        for turn, (advantages, ratios) in zip(turns, notes, strict=True):
            turn.advantages, turn.ratios = advantages, ratios
        return metrics

    def seconds(self) -> dict[str, float]:
        found, self._seconds = self._seconds, {}
        return found

    def reference_digest(self) -> str | None:
        self._described()
        return self._reference

    def write(self, folder: Path) -> dict[str, Any]:
        """As `Learner.write`. The files of one rank after the other come here, and are gone before the next ones."""
        answers = self._answers("write", answers=self._config.learners)
        for (files,), _ in answers:
            try:
                write_files(ray.get(files), folder)
            except RayError as error:
                raise self._lost("write", error) from None
        return answers[0][1]

    def read(self, folder: Path, control: dict[str, Any]) -> None:
        files = sorted(folder.glob("*.safetensors"))
        self._call("read", {file.name: ray.put(file.read_bytes()) for file in files}, control)

    def close(self) -> None:
        """End the ranks."""
        if self._thread.is_alive() and self._newest is not None:  # else nobody is there to hear it
            self._mailbox.post.remote(self._number, ("stop", ()), answers=0)
            self._thread.join(timeout=30.0)
        ray.kill(self._mailbox)  # whoever still waits there ends, too
        self._folder.cleanup()

    # ---------------------------------------------------------------- calls

    def _fit(self, trainer: TorchTrainer) -> None:
        try:
            trainer.fit()
        except BaseException as error:
            self._error = error

    def _call(self, method: str, *arguments: Any, limit: float | None = None) -> Any:
        """What the first rank answers."""
        return self._answers(method, *arguments, answers=1, limit=limit)[0]

    def _answers(self, method: str, *arguments: Any, answers: int, limit: float | None = None) -> list[Any]:
        answer = self._mailbox.post.remote(self._number, (method, arguments), answers=answers)
        self._number += 1
        due = None if limit is None else time.monotonic() + limit
        while True:
            is_alive = self._thread.is_alive()
            ready, _ = ray.wait([answer], timeout=_POLL_SECONDS if is_alive else 0)
            if ready:
                try:
                    return ray.get(answer)
                except RayError as error:
                    raise self._lost(method, error) from None
            if not is_alive:
                raise self._lost(method, self._error)
            if due is not None and time.monotonic() > due:
                cluster, total = self._config, ray.cluster_resources()
                raise UserError(
                    f"the {cluster.learners} learner ranks did not start within cluster.start_seconds="
                    f"{cluster.start_seconds:g}: lower cluster.learners or cluster.learner_cpus="
                    f"{cluster.learner_cpus:g} and learner_gpus={cluster.learner_gpus:g}, of which, with those of the "
                    f"rollout workers, the cluster has {total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs"
                )

    def _lost(self, method: str, error: BaseException | None) -> LearnerLost:
        reason = "it ended" if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:300]
        text = f"the learner group is lost ({method}: {reason})"
        self._events.add(text, event="learner_lost", during=method, reason=reason)
        self._events.tell()
        return LearnerLost(text)
