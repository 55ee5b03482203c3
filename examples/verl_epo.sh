#!/usr/bin/env bash
# EPO inside verl 0.9.1: multi-turn GRPO with the entropy corridor. See docs/verl.md.
#
#   pip install verl==0.9.1 epo-agents      # and verl's own extras for your engine, such as verl[vllm]
#   MODEL=Qwen/Qwen2.5-1.5B-Instruct TRAIN=train.parquet VAL=val.parquet TOOLS=tools.yaml bash examples/verl_epo.sh
set -euo pipefail

# verl imports these modules in each of its processes. On a Ray cluster that is already running, name them to Ray instead:
#   +ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=epo.integrations.verl
export VERL_USE_EXTERNAL_MODULES="${VERL_USE_EXTERNAL_MODULES:-epo.integrations.verl}"

OVERRIDES=(
  # EPO: the loss, its options (epo methods epo_strong lists them), and the engine that adds the entropy term.
  actor_rollout_ref.actor.policy_loss._target_=epo.integrations.verl.EPOPolicyLossConfig
  actor_rollout_ref.actor.policy_loss.loss_mode=epo
  +actor_rollout_ref.actor.policy_loss.method=epo_strong
  +actor_rollout_ref.actor.policy_loss.options.coefficient=0.001
  +actor_rollout_ref.model.model_type=epo
  actor_rollout_ref.actor.calculate_entropy=True
  actor_rollout_ref.actor.entropy_coeff=0
  # The rest is an ordinary run of verl.
  algorithm.adv_estimator=grpo
  data.train_files="${TRAIN:-train.parquet}"
  data.val_files="${VAL:-val.parquet}"
  data.train_batch_size=64
  data.max_prompt_length=2048
  data.max_response_length=8192
  actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}"
  actor_rollout_ref.actor.strategy=fsdp2
  actor_rollout_ref.actor.optim.lr=1e-6
  actor_rollout_ref.actor.ppo_mini_batch_size=64
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384
  actor_rollout_ref.actor.fsdp_config.entropy_from_logits_with_chunking=True
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
  actor_rollout_ref.rollout.multi_turn.enable=True
  actor_rollout_ref.rollout.multi_turn.max_assistant_turns=30
  actor_rollout_ref.rollout.multi_turn.tool_config_path="${TOOLS:-tools.yaml}"
  actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent
  trainer.total_epochs=15
  trainer.n_gpus_per_node="${GPUS:-8}"
  trainer.save_freq=20
  trainer.logger='["console"]'
)

exec python3 -m verl.trainer.main_ppo "${OVERRIDES[@]}" "$@"
