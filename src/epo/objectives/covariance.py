"""Covariance of log-probability and advantage: how strongly a token's update changes the entropy.

Legend for tensor suffixes: _N tokens of one mini-batch.
"""

from __future__ import annotations

from torch import Tensor


def covariances(logprobs_N: Tensor, advantages_N: Tensor) -> Tensor:
    """c_i = (log pi_i - mean log pi) (A_i - mean A) over the tokens given, without gradient.

    Under a softmax policy the entropy falls with the mean of c: likely tokens with good advantages, and unlikely ones
    with bad advantages, take it away ("The Entropy Mechanism of RL", arXiv 2505.22617). The definition is that of its
    official code; the paper's numbering was not seen.

    Args:
        logprobs_N: [N] under the policy as it is now.
        advantages_N: [N].

    Raises:
        ValueError: shapes differ.
    """
    if logprobs_N.shape != advantages_N.shape:
        raise ValueError(f"logprobs and advantages differ: {list(logprobs_N.shape)} and {list(advantages_N.shape)}")
    logprobs_N, advantages_N = logprobs_N.detach(), advantages_N.detach()
    if logprobs_N.numel() == 0:
        return logprobs_N.clone()
    return (logprobs_N - logprobs_N.mean()) * (advantages_N - advantages_N.mean())
