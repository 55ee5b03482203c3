"""A run and its trajectories in the terminal."""
