"""EPO in a plain PyTorch PPO loop: the lines marked `# EPO` are all it takes. Runs on a CPU in a few seconds.

The task: in each of 1 to 4 turns read a digit and answer with its successor; reward 1 if every answer was right.
Suffixes: _B episodes, _T positions (digit, answer, digit, ...), _K turns, _N answers of all episodes, _D hidden size.
"""

import torch
from torch import Tensor, nn

from epo.objectives import clipped_surrogate, make_control, token_logprobs_and_entropy, trajectory_weights, whiten

DIGITS, TURNS, EPISODES, STEPS = 6, 4, 256, 50
torch.manual_seed(0)
embedding, network, head = nn.Embedding(DIGITS, 32), nn.GRU(32, 32, batch_first=True), nn.Linear(32, DIGITS, bias=False)
optimizer = torch.optim.Adam([*embedding.parameters(), *network.parameters(), *head.parameters()], lr=3e-3)
control = make_control("epo_strong", coefficient=0.001)  # EPO, or `bonus`; others need the hooks in docs/objectives.md


def score(tokens_B_T: Tensor, answered_B_K: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every answer."""
    hidden_N_D = network(embedding(tokens_B_T))[0][:, 0::2][answered_B_K]
    return token_logprobs_and_entropy(hidden_N_D, head.weight, tokens_B_T[:, 1::2][answered_B_K])


@torch.no_grad()
def rollout() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, which turns were played (episodes differ in length), and the reward of each episode."""
    digits_B_K, tokens, state = torch.randint(DIGITS, (EPISODES, TURNS)), [], None
    for turn in range(TURNS):
        hidden_B_1_D, state = network(embedding(digits_B_K[:, turn : turn + 1]), state)
        answer_B = torch.distributions.Categorical(logits=head(hidden_B_1_D[:, 0])).sample()
        tokens += [digits_B_K[:, turn], answer_B]
        _, state = network(embedding(answer_B[:, None]), state)
    tokens_B_T = torch.stack(tokens, dim=1)
    answered_B_K = torch.arange(TURNS) < torch.randint(1, TURNS + 1, (EPISODES, 1))
    right_B_K = tokens_B_T[:, 1::2] == (digits_B_K + 1) % DIGITS
    return tokens_B_T, answered_B_K, (right_B_K | ~answered_B_K).all(dim=1).float()


for step in range(STEPS):
    tokens_B_T, answered_B_K, rewards_B = rollout()
    episode_N, turn_N = answered_B_K.nonzero(as_tuple=True)
    weights_N = trajectory_weights(episode_N, turn_N)  # EPO: every episode alike, however long
    advantages_N = whiten(rewards_B[episode_N])
    old_logprobs_N, old_entropy_N = (x.detach() for x in score(tokens_B_T, answered_B_K))
    for _ in range(4):
        logprobs_N, entropy_N = score(tokens_B_T, answered_B_K)
        loss = (weights_N * clipped_surrogate(logprobs_N, old_logprobs_N, advantages_N).loss_N).sum()
        loss = loss + control.entropy_loss(entropy_N, weights_N, turn_N, step=step, total_steps=STEPS).loss  # EPO
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    control.observe(old_entropy_N, episode_N, turn_N)  # EPO: once per step, after the update
    if step % 10 == 9:
        print(f"step {step + 1}: success {rewards_B.mean():.2f}, entropy {old_entropy_N.mean():.2f} nats")
