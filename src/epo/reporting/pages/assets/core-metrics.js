"use strict";
// What a metric is called for people, its unit, and one sentence on its meaning. docs/metrics.md says more.
(function () {
  // name: [title, unit, sentence]; units: share (drawn as per cent), nats, s, count, "" (a plain number)
  const METRICS = {
    "success/train": [
      "Success in training",
      "share",
      "Share of the step's training episodes that fully solved their task.",
    ],
    "reward/mean": ["Reward", "", "Mean total reward of an episode, penalties included."],
    "reward/std": [
      "Spread of rewards",
      "",
      "Standard deviation of rewards, inside task groups where there are any: without spread there is nothing to learn.",
    ],
    "turns/repeated": [
      "Repeated actions",
      "share",
      "Share of turns that repeat the action before although the observation stayed the same.",
    ],
    "response/tokens_max": ["Longest response", "count", "Tokens of the step's longest response."],
    "response/repetition": [
      "Repetition in responses",
      "share",
      "Share of a response's runs of four tokens that occurred in it before.",
    ],
    "input/mutual_information": [
      "Input dependence",
      "nats",
      "Mutual information of prompts and responses: about 0 when responses do not depend on what was read.",
    ],
    "input/mutual_information_per_token": [
      "Input dependence per token",
      "nats",
      "Mutual information of prompts and responses, divided by the responses' tokens.",
    ],
    "input/retrieval_accuracy": [
      "Prompts told from responses",
      "share",
      "Share of responses that are more probable after their own prompt than after any other.",
    ],
    "input/retrieval_chance": ["Prompts told by chance", "share", "What guessing the prompt of a response would give."],
    "value/std": ["Spread of values", "", "Standard deviation of the critic's values."],
    "value/returns_std": ["Spread of returns", "", "Standard deviation of the returns that the critic learns."],
    "time/health": ["Input dependence, measuring", "s", "Seconds for measuring how responses depend on their prompts."],
    "score/train": [
      "Progress in training",
      "share",
      "Mean progress at the end of an episode, from nothing to fully solved.",
    ],
    episodes: ["Episodes", "count", "Episodes played in the step."],
    "episodes/restarts": ["Replaced workers", "count", "Environment workers that were replaced during the step."],
    "turns/mean": ["Turns per episode", "count", "How many turns an episode took on average."],
    "turns/invalid": ["Invalid actions", "share", "Share of turns whose response lacks the required format."],
    "turns/not_understood": [
      "Actions not understood",
      "share",
      "Share of turns whose action the environment could not interpret.",
    ],
    "response/tokens": ["Response length", "count", "Sampled tokens per turn."],
    "context/segments": [
      "Training rows per episode",
      "",
      "Rows that an episode is packed into: 1 where nothing was left out of the transcript.",
    ],
    "context/dropped_turns": [
      "Dropped turns",
      "",
      "Earlier turns that the prompt left out for lack of room, the most at any turn, mean over episodes.",
    ],
    "context/drift": [
      "Tokenisation drift",
      "share",
      "Share of turns whose text, encoded again, gives other token ids than were drawn.",
    ],
    "groups/all_equal": [
      "Groups with equal rewards",
      "share",
      "Share of groups whose members all got the same reward: they teach a group-relative method nothing.",
    ],
    "entropy/mean": [
      "Entropy, all tokens",
      "nats",
      "Mean entropy per sampled token: how open the policy's choices are.",
    ],
    "entropy/turn_early": [
      "Entropy, early turns",
      "nats",
      "Mean entropy per token in the first third of the turns actually played.",
    ],
    "entropy/turn_late": [
      "Entropy, late turns",
      "nats",
      "Mean entropy per token in the last third of the turns actually played.",
    ],
    "entropy/think": ["Entropy, thoughts", "nats", "Mean entropy per token inside the thoughts of the responses."],
    "entropy/action": ["Entropy, actions", "nats", "Mean entropy per token inside the actions of the responses."],
    "entropy/oscillation": [
      "Entropy oscillation",
      "nats",
      "Standard deviation of the last ten step-to-step changes of the mean entropy.",
    ],
    "entropy/reference": [
      "Historical entropy H_ref",
      "nats",
      "Mean entropy of all steps so far, around which the corridor stands.",
    ],
    "entropy/below": [
      "Tokens below the corridor",
      "share",
      "Share of trained tokens with less entropy than the corridor's floor.",
    ],
    "entropy/above": [
      "Tokens above the corridor",
      "share",
      "Share of trained tokens with more entropy than the corridor's ceiling.",
    ],
    "entropy/loss": ["Entropy term of the loss", "", "What the entropy term adds to the loss."],
    "filter/kept_groups": [
      "Groups kept by the filter",
      "count",
      "Task groups that the filter let through to training.",
    ],
    "adaptive/coefficient": [
      "Adaptive entropy coefficient",
      "",
      "The entropy coefficient that the adaptive method has reached.",
    ],
    "siren/entropy": ["SIREN entropy", "nats", "Masked entropy that SIREN holds near its anchor."],
    "siren/anchor": ["SIREN anchor", "nats", "The entropy that SIREN aims at."],
    "epo/beta": [
      "Phase weight β",
      "",
      "Weight of the smoothing term by training phase: 2 at the start, towards 1 at the end.",
    ],
    "epo/smoothing": ["Smoothing loss", "nats", "How far tokens lie outside the corridor, before β and λ."],
    "epo/effective_weight": [
      "Effective entropy weight",
      "",
      "The weight the entropy bonus really has on average, after the smoothing term took its part.",
    ],
    "epo/gradient_share": [
      "Smoothing share of the gradient",
      "share",
      "The smoothing term's share in the gradient of the whole entropy term.",
    ],
    "policy/loss": ["Policy loss", "", "The clipped surrogate that the policy minimises."],
    "policy/kl": [
      "KL of the update",
      "nats",
      "How far the step's updates moved the policy from where it sampled (k3 estimate).",
    ],
    "policy/reference_kl": [
      "KL to the starting model",
      "nats",
      "How far the policy has moved from the model it started from.",
    ],
    "policy/clip_fraction": ["Clip fraction", "share", "Share of tokens whose surrogate was clipped."],
    "policy/grad_norm": [
      "Gradient norm, policy",
      "",
      "Norm of the policy's gradient before clipping, mean over the step's updates.",
    ],
    "value/grad_norm": [
      "Gradient norm, critic",
      "",
      "Norm of the critic's gradient before clipping, mean over the step's updates.",
    ],
    "value/loss": ["Critic loss", "", "Squared error of the critic's values."],
    "value/mean": ["Critic's mean value", "", "Mean of the values the critic predicted."],
    "value/explained_variance": [
      "Explained variance",
      "",
      "Share of the returns' variance that the critic explains before the update: 1 all, 0 nothing, below 0 worse than a constant.",
    ],
    "advantage/std": ["Spread of advantages", "", "Standard deviation of the advantages that weigh the tokens."],
    "sampler/mismatch_kl": [
      "Sampler mismatch",
      "nats",
      "KL between sampler and learner at equal weights: 0 when both compute alike.",
    ],
    "sampler/mismatch_max": [
      "Largest sampler mismatch",
      "nats",
      "Largest difference in log-probability between sampler and learner on one token.",
    ],
    "sampler/ratio_p01": [
      "Ratio of learner to sampler, 1st percentile",
      "",
      "One token of a hundred is less probable by the learner than by the sampler by this factor or a smaller one.",
    ],
    "sampler/ratio_p99": [
      "Ratio of learner to sampler, 99th percentile",
      "",
      "One token of a hundred is more probable by the learner than by the sampler by this factor or a larger one.",
    ],
    "sampler/ratio_outside": [
      "Ratios outside of 0.9 to 1.1",
      "share",
      "Share of tokens whose probability by the learner is more than a tenth off the sampler's.",
    ],
    "sampler/importance_mean": [
      "Mean importance weight",
      "",
      "Mean of the weights that correct for the sampler's mismatch; 1 means no correction.",
    ],
    "sampler/staleness": [
      "Staleness",
      "updates",
      "Updates by which the weights that drew a token were older than those it was trained on, mean over tokens.",
    ],
    "sampler/staleness_max": ["Largest staleness", "updates", "The same, of the oldest token."],
    "sampler/importance_truncated": [
      "Truncated importance weights",
      "share",
      "Share of tokens whose importance weight was cut.",
    ],
    "update/optimizer_steps": ["Optimiser steps", "count", "Optimiser steps taken in the RL step."],
    "update/skipped": [
      "Skipped optimiser steps",
      "count",
      "Optimiser steps left out because loss or gradient was not finite.",
    ],
    "update/learning_rate": ["Learning rate", "", "The policy's learning rate."],
    "tokens/sampled": ["Tokens sampled", "count", "Tokens the policy drew in the step."],
    "tokens/trained": ["Tokens trained", "count", "Tokens that entered the loss."],
    "tokens/processed": ["Tokens processed", "count", "Tokens run through the learner per pass, prompts included."],
    "tokens/per_second": ["Tokens per second", "count", "Sampled tokens per second of the whole step."],
    rows: ["Packed rows", "count", "Training rows of the step."],
    "memory/learner_mb": ["Memory of the learner, MB", "", "Resident memory of the process that trains."],
    "memory/workers_mb": [
      "Memory of the workers, MB",
      "",
      "Resident memory of all environment workers together, with what they started, such as a JVM.",
    ],
    "workers/died": ["Workers that died", "count", "Environment workers replaced since the step before: they had died."],
    "workers/hung": [
      "Workers that hung",
      "count",
      "Environment workers replaced since the step before: they gave no answer in time.",
    ],
    "workers/failed": [
      "Workers that failed",
      "count",
      "Environment workers replaced since the step before: their environment raised an error.",
    ],
    "workers/grown": [
      "Workers that grew",
      "count",
      "Environment workers replaced since the step before, between episodes: they held too much memory.",
    ],
    "time/step": ["Time per step", "s", "Seconds of the whole step."],
    "time/environment": ["Environments", "s", "Seconds spent waiting for environments."],
    "time/prefill": ["Reading prompts", "s", "Seconds in which the sampler read prompts."],
    "time/workers": ["Rollout workers", "s", "Seconds spent waiting for rollout workers of a cluster."],
    "time/decode": ["Drawing tokens", "s", "Seconds in which the sampler drew tokens."],
    "time/sampling_rest": [
      "Rest of sampling",
      "s",
      "The rest of sampling; all of it for a sampler that does not tell prefill from decode.",
    ],
    "time/old_logprobs": ["Old log-probabilities", "s", "Seconds for log-probabilities computed anew by the learner."],
    "time/values": ["Critic's values", "s", "Seconds for the critic's values."],
    "time/reference": ["Reference model", "s", "Seconds for the reference of the KL loss."],
    "time/update": ["Update", "s", "Seconds of the optimiser steps."],
    "time/other": ["Other", "s", "What nothing else accounts for: prompts and parsing, packing, advantages."],
    "time/forward": ["Forward", "s", "Part of the update: forward passes and losses."],
    "time/backward": ["Backward", "s", "Part of the update: backward passes."],
    "time/optimizer": ["Optimiser", "s", "Part of the update: the optimiser itself."],
    "time/rollout": ["Episodes", "s", "Seconds for all of the episodes."],
    "time/sampling": ["Sampling", "s", "Seconds for reading prompts and drawing tokens."],
    "eval/iid/success": [
      "Success, iid panel",
      "share",
      "Share of the evaluation episodes that were fully solved, on tasks like those of training.",
    ],
    "eval/ood/success": [
      "Success, ood panel",
      "share",
      "Share of the evaluation episodes that were fully solved, on tasks unlike those of training.",
    ],
  };

  const words = (name) => name.replace(/[_/]+/g, " ").trim();
  const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

  // {name, title, unit, text}; a metric this list does not know keeps its name.
  EPO.metric = (name) => {
    const known = METRICS[name];
    if (known) return { name, title: known[0], unit: known[1], text: known[2] };
    const [family, ...rest] = name.split("/");
    const tail = rest.join("/");
    if (family === "stop")
      return {
        name,
        title: capital(words(tail)),
        unit: "share",
        text: `Share of episodes that ended with: ${words(tail)}.`,
      };
    if (family === "health")
      return { name, title: `Alarm: ${words(tail)}`, unit: "", text: "1 at the steps at which the alarm was on." };
    if (family === "time") return { name, title: capital(words(tail)), unit: "s", text: "Seconds." };
    if (family === "eval")
      return {
        name,
        title: `${capital(words(rest.slice(1).join("/")))}, ${rest[0]} panel`,
        unit: tail.endsWith("success") ? "share" : "",
        text: "Measured on a fixed evaluation panel.",
      };
    return { name, title: name, unit: "", text: "" };
  };

  // Names of all metrics of all runs that have at least one value, sorted.
  EPO.metricNames = () => {
    const names = new Set();
    for (const run of EPO.page.runs) {
      for (const [name, column] of Object.entries(run.metrics)) if (column.some(EPO.isNumber)) names.add(name);
    }
    return [...names].sort();
  };

  // The evaluations of a panel as points {step, success, low, high, episodes, ..}.
  EPO.panel = (run, split) =>
    run.evaluations.flatMap((e) => e.panels.filter((p) => p.split === split).map((p) => ({ step: e.step, ...p })));

  EPO.splits = (runs) => {
    const found = new Set(runs.flatMap((run) => run.evaluations.flatMap((e) => e.panels.map((p) => p.split))));
    return [...found].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  };
  const rank = (split) => ({ iid: 0, ood: 1 })[split] ?? 2;
})();
