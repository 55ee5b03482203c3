"""Ray: rollout workers and a learner group. Imported only with `--cluster`."""
