"""The alarms: what each looks for, why, and what to try. What judges a run by them is `epo.reporting.health`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from epo.reporting.health import rules
from epo.reporting.health.rules import Rule

RAGEN = "RAGEN, arXiv 2504.20073"
RAGEN_2 = "RAGEN-2, arXiv 2604.06268"
SEAL = "Cyclical Entropy Eruption, arXiv 2605.27954"
EPO = "EPO, arXiv 2509.22576"
OURS = "threshold: ours"


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """One thing that goes wrong in training."""

    name: str
    title: str
    definition: str
    """In words, with the default threshold of `HealthConfig`; the rule is `epo.reporting.health.rules.<name>`."""
    threshold: str
    """The default, and what it means."""
    source: str
    """Who saw it go wrong, and where the threshold comes from."""
    advice: str
    """What to try, in plain words."""
    needs: tuple[str, ...]
    """Metrics it looks at; without them it stays silent."""
    persistence: int = 1
    """Steps in a row at which the rule must fire before the alarm begins."""

    @property
    def rule(self) -> Rule:
        return getattr(rules, self.name)


_ALARMS = (
    Alarm(
        name="entropy_eruption",
        title="Entropy eruption",
        definition="The entropy per token jumps above twice the median of the last 10 steps, or rises above three "
        "times the calmest 10 steps of the run; by 0.1 nats and 4 robust standard deviations at least.",
        threshold="factor 2",
        source=f"{SEAL}; verl issue 2738. The factor is the upper edge of the paper's corridor, kappa_high = 2 "
        f"({EPO}); measured against recent steps, and the rest of the threshold: ours",
        advice="lower optimizer.learning_rate or the entropy coefficient, or hold entropy down: "
        "entropy.method=epo_strong or entropic. "
        "Go back to the last good checkpoint: habits picked up in an eruption stay",
        needs=("entropy/mean",),
    ),
    Alarm(
        name="entropy_collapse",
        title="Entropy collapse",
        definition="For 3 steps the entropy per token is below a tenth of what the run began with (median of its "
        "first 3 steps), or below 0.01 nats, while fewer than 95 % of the episodes succeed.",
        threshold="share 0.1",
        source=f"The Entropy Mechanism of RL for Reasoning LMs, arXiv 2505.22617; {OURS}",
        advice="raise entropy.coefficient, give entropy.kappa_low a floor above 0, or try "
        "entropy.method=clip_higher or clip_cov; lower optimizer.learning_rate; sample with group_size "
        "above 1 so that rare successes are compared",
        needs=("entropy/mean", "success/train"),
        persistence=3,
    ),
    Alarm(
        name="entropy_oscillation",
        title="Entropy oscillation",
        definition="The standard deviation of the step-to-step changes of the mean entropy over the last 10 changes "
        "exceeds half of the mean entropy of the 10 steps before, and 0.1 nats.",
        threshold="share 0.5",
        source=f"{EPO} (oscillation between exploring too much and too little); {SEAL}; {OURS}",
        advice="more episodes per step (rollout.tasks_per_step), a lower optimizer.learning_rate, or "
        "entropy.method=epo_strong, which pushes entropy down where it exceeds twice the run's own "
        "history",
        needs=("entropy/oscillation", "entropy/mean"),
    ),
    Alarm(
        name="cascade",
        title="Early-late gap (cascade)",
        definition="For 2 steps the entropy of the last third of the turns, less that of the first third, is above "
        "twice its median of the last 10 steps (three times that of the calmest 10); by 0.1 nats and 4 "
        "robust standard deviations at least.",
        threshold="factor 2",
        source=f"{EPO} (exploration-exploitation cascade: what early turns leave open piles up in late turns); {OURS}",
        advice="look at late turns in the trajectories: do prompts outgrow the context, does the agent lose "
        "track? Weigh early turns more (entropy.method=epo_decay), shorten episodes (environment.max_turns), "
        "or credit turns (algorithm.advantage=turn)",
        needs=("entropy/turn_early", "entropy/turn_late"),
        persistence=2,
    ),
    Alarm(
        name="reward_variance",
        title="Reward variance cliff",
        definition="For 5 steps the standard deviation of rewards (within task groups; over the step where groups "
        "have one episode) is below a quarter of the best level the run had (highest median of 10 steps), "
        "while fewer than 95 % of the episodes succeed.",
        threshold="share 0.25",
        source=f"{RAGEN} (reward variance cliffs before collapse); {RAGEN_2} (without it regularisers rule the "
        f"gradient); {OURS}",
        advice="all episodes now earn the same, so nothing is learnt: draw other or easier tasks, a larger "
        "group_size, algorithm.filter=snr or starpo_s, and look whether the agent repeats one behaviour "
        "everywhere",
        needs=("reward/std", "success/train"),
        persistence=5,
    ),
    Alarm(
        name="gradient_spike",
        title="Gradient spike",
        definition="The gradient norm of policy or critic, before clipping, is above five times its median of the "
        "last 10 steps, above 1, and 4 robust standard deviations above that median; or an optimiser step "
        "was skipped for a loss or gradient that is not finite.",
        threshold="factor 5",
        source=f"{RAGEN} (gradient spikes mark the collapse); verl issue 1066; {OURS}",
        advice="lower optimizer.learning_rate or optimizer.grad_clip, check sampler/mismatch_kl and "
        "policy/clip_fraction of the step, and use more episodes per step",
        needs=("policy/grad_norm", "value/grad_norm", "update/skipped"),
    ),
    Alarm(
        name="invalid_actions",
        title="Surge of invalid actions",
        definition="The share of turns without the required format, or not understood by the environment, is above "
        "twice its median of the last 10 steps, 0.1 and 4 robust standard deviations above it.",
        threshold="rise 0.1",
        source=f"verl-agent issue 188 (valid actions plummet as responses grow); {SEAL}; {OURS}",
        advice="read the step's trajectories first. Raise agent.invalid_action_penalty, set "
        "agent.list_actions=true, lower optimizer.learning_rate, or go back to the last good checkpoint",
        needs=("turns/invalid", "turns/not_understood"),
    ),
    Alarm(
        name="length",
        title="Surge of response length",
        definition="The mean response is above 1.5 times its median of the last 10 steps, 2 tokens and 4 robust "
        "standard deviations above it. Slow growth is not meant: it may be learnt.",
        threshold="factor 1.5",
        source=f"verl-agent issue 188; verl issue 1066; {OURS}",
        advice="lower agent.max_response_tokens, use a token-mean loss (algorithm.aggregate=token) or constant "
        "rather than trajectory, lower optimizer.learning_rate; a length surge often precedes an eruption",
        needs=("response/tokens",),
    ),
    Alarm(
        name="repetition",
        title="Repetition",
        definition="The share of repeated 4-grams inside responses, or of turns that repeat the action before "
        "although the observation stayed the same, is above twice its median of the last 10 steps, 0.1 "
        "and 4 robust standard deviations above it.",
        threshold="rise 0.1",
        source=f"seq-rep-4 of Welleck et al., arXiv 1908.04319; {SEAL} (sentence duplication stays after an "
        f"eruption); {OURS}",
        advice="go back to the last good checkpoint; keep entropy up early (entropy.coefficient), make a step "
        "that changes nothing cost something in the environment, show more history "
        "(agent.context=transcript)",
        needs=("response/repetition", "turns/repeated"),
    ),
    Alarm(
        name="template_collapse",
        title="Template collapse",
        definition="The mutual information of what the policy reads and writes (median of the last 10 steps) is "
        "below a quarter of the best level the run had (highest median of 10 earlier steps), or below 0.02 nats per "
        "response, while fewer than 95 % of the episodes succeed.",
        threshold="share 0.25",
        source=f"{RAGEN_2} (in-batch cross-scoring); {OURS}",
        advice="responses no longer depend on the input, though entropy may look well: train on groups whose "
        "rewards differ (algorithm.filter=snr with group_size above 1), lower entropy.coefficient and "
        "algorithm.kl_coefficient, which push all inputs the same way",
        needs=("input/mutual_information", "success/train"),
    ),
    Alarm(
        name="sampler_mismatch",
        title="Sampler and learner disagree",
        definition="The KL between the distribution that was sampled from and the learner's (k3, nats per token) is "
        "above 0.01.",
        threshold="0.01 nats",
        source="When Speed Kills Stability (Liu, Li et al. 2025); Diagnosing Training-Inference Mismatch, arXiv "
        "2605.14220. Threshold: ours, ten times what vLLM in bfloat16 showed (docs/vllm.md)",
        advice="set sampler.old_logprobs=learner, compute in float32 (model.compute), lower "
        "sampler.importance_cap, and check that the sampler has the learner's weights",
        needs=("sampler/mismatch_kl",),
    ),
    Alarm(
        name="equal_groups",
        title="Groups without difference",
        definition="For 5 steps more than 80 % of the task groups earned the same reward with every episode, while "
        "fewer than 95 % of the episodes succeed.",
        threshold="share 0.8",
        source=f"DAPO, arXiv 2503.14476 (dynamic sampling: such groups have no gradient); {OURS}",
        advice="group-relative methods learn nothing from such groups: larger rollout.group_size, tasks of "
        "middling difficulty, a reward that tells degrees of success apart, or algorithm.name=ppo",
        needs=("groups/all_equal", "success/train"),
        persistence=5,
    ),
    Alarm(
        name="dead_critic",
        title="Dead critic",
        definition="The critic explained less than 1 % of the variance of returns in every one of the last 10 steps "
        "whose returns varied (at least half as much as they ever did); the first 3 steps are let pass.",
        threshold="0.01",
        source="explained variance as in cleanrl and Stable-Baselines3: 0 is no better than a constant, negative "
        f"worse; {OURS}",
        advice="raise algorithm.critic.learning_rate or algorithm.critic.coefficient, try "
        "algorithm.critic.trunk=separate, check the scale of rewards, or use a method without critic "
        "(grpo, rloo)",
        needs=("value/explained_variance", "value/returns_std"),
    ),
    Alarm(
        name="environment_errors",
        title="Episodes lost to the environment",
        definition="More than 10 % of the step's episodes were lost to errors of the environment: its worker died, "
        "hung or answered nonsense, and starting it again did not help.",
        threshold="share 0.1",
        source=f"no publication: lost episodes are not trained on and count as failures in success/train; {OURS}",
        advice="read what a lost episode says under error (epo show RUN) and the workers' last words in the log. Raise "
        "environment.timeout_seconds where calls hang, lower environment.workers or set environment.worker_memory_mb "
        "where memory runs out, start the server again that the suite talks to, and try the suite by itself (epo env "
        "check)",
        needs=("stop/environment_error",),
    ),
)
ALARMS: dict[str, Alarm] = {alarm.name: alarm for alarm in _ALARMS}
"""By name, which is also the key of the threshold in `health` of a recipe."""


def catalogue() -> list[dict[str, Any]]:
    """Every alarm as plain data, for pages and tables."""
    return [asdict(alarm) for alarm in _ALARMS]
