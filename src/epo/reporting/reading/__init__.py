"""Run folders as data, also while they are written."""
