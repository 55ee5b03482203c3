"""Names of the streams of random numbers, so that no two consumers ever draw the same ones.

Every generator is seeded with (seed of the run, stream, what else tells its draws apart). Numpy pads such keys with
zeros: without the stream's number in second place, a shorter key would equal a longer one that ends in zeros.
"""

from __future__ import annotations

TRAINING_STREAM = 1
"""Responses of training episodes."""
PANEL_STREAM = 2
"""Responses of panel episodes."""
SHUFFLE_STREAM = 3
"""Dealing task groups into mini-batches."""
CONTROL_STREAM = 4
"""What an entropy control draws for a mini-batch."""
HEALTH_STREAM = 5
"""Which responses of a step are scored under other prompts."""
