"""`trainer_mode=epo_sync`: verl's own `_compute_advantage` with estimators `epo_*`; a dictionary stands for a queue."""

from __future__ import annotations

from typing import Any

import pytest
import transfer_queue
from omegaconf import OmegaConf
from tensordict import TensorDict
from test_verl_advantages import GAMMA, LAM, LENGTHS, ROWS, batch, estimate
from test_verl_configuration import composed, documented
from torch.testing import assert_close
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from epo.integrations.verl.trainer import EPOTrainerSync, name_of

KEYS = ["u_0_1", "u_1_0", "u_0_0", "w_0_0", "padf3_0_0"]
"""verl's keys of ROWS: group a is u, with x and y as its sessions 0 and 1."""


class Queue:
    """Rows by key, as `transfer_queue` keeps them."""

    def __init__(self, rows: dict[str, dict[str, Any]]) -> None:
        self.rows = rows

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> TensorDict:
        assert partition_id == "train"
        found = [{name: self.rows[key][name] for name in select_fields if name in self.rows[key]} for key in keys]
        return list_of_dict_to_tensordict(found)

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: TensorDict) -> KVBatchMeta:
        for key, row in zip(keys, fields, strict=True):
            self.rows[key] |= {name: row[name] for name in row.keys()}  # noqa: SIM118
        return KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id=partition_id)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """ROWS as an agent loop leaves them."""
    data, rows = batch()
    assert rows.values_B_L is not None
    found = {}
    for index, key in enumerate(KEYS):
        found[key] = {
            "uid": key.rsplit("_", 2)[0],
            "response_mask": data.batch["response_mask"][index, : LENGTHS[index]],
            "rm_scores": rows.scores_B_L[index, : LENGTHS[index]],
            "values": rows.values_B_L[index, : LENGTHS[index]],
        }
    queue = Queue(found)
    monkeypatch.setattr(transfer_queue, "kv_batch_get", queue.kv_batch_get)
    monkeypatch.setattr(transfer_queue, "kv_batch_put", queue.kv_batch_put)
    return queue


def trainer(estimator: str) -> EPOTrainerSync:
    made = object.__new__(EPOTrainerSync)
    made.use_critic = True
    made.config = OmegaConf.create(
        {
            "algorithm": {
                "adv_estimator": estimator,
                "gamma": GAMMA,
                "lam": LAM,
                "norm_adv_by_std_in_grpo": True,
                "use_kl_in_reward": False,
            },
            "actor_rollout_ref": {"rollout": {"n": 2}},
        }
    )
    return made


@pytest.mark.parametrize("estimator", ["epo_turn_gae", "epo_bilevel_gae", "epo_trajectory_gae", "epo_grpo"])
def test_advantages_come_back_into_verls_queue(queue: Queue, estimator: str) -> None:
    """Row by row those of the estimator on the same rows, whose place in the trajectory verl's keys say."""
    meta = KVBatchMeta(keys=KEYS, tags=[{}] * len(KEYS), partition_id="train")
    trainer(estimator)._compute_advantage(meta, {})
    wanted = dict(zip(("advantages", "returns"), estimate(estimator, *batch()), strict=True))
    assert [int(queue.rows[key]["turn_index"]) for key in KEYS] == [place for _, place, *_ in ROWS]
    for index, key in enumerate(KEYS):
        for name, expected_B_L in wanted.items():
            found_L = queue.rows[key][name]
            assert_close(found_L, expected_B_L[index, : len(found_L)].to(found_L.dtype), rtol=1e-12, atol=1e-12)
    assert any(bool(queue.rows[key]["advantages"].any()) for key in KEYS)


def test_the_rest_of_verl_sees_its_synchronous_trainer() -> None:
    """verl takes its asynchronous replay buffer for every other name of a mode."""
    config = composed(documented("Advantages over turns"))
    made = get_trainer_cls("epo_sync")(config)
    assert made.trainer_mode == "sync"
    assert type(made.replay_buffer) is ReplayBuffer
    assert made.use_critic
    assert config.trainer.v1.trainer_mode == "epo_sync"


def test_names_of_keys() -> None:
    assert name_of("3f_2_b7_0_12") == ("3f_2_b7_0", 12)
    assert [name_of(key) for key in KEYS[:2]] == [("u_0", 1), ("u_1", 0)]
