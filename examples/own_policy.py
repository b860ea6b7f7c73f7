"""A user-defined policy, trained with REINFORCE and compared with the baselines.

Run with ``python examples/own_policy.py [steps]`` (default 150, about two minutes on two CPU cores).
"""

import sys

import gymnasium
import torch

import grip_env
from agents import BASELINES, KSubset, keep_best
from grip_env import compare


class Matcher(torch.nn.Module):
    """Policy that scores each token by its best match among the words of the question."""

    def __init__(self, width):
        super().__init__()
        self.token, self.word = torch.nn.Linear(width, 32), torch.nn.Linear(width, 32)

    def forward(self, seen):
        match = self.token(torch.as_tensor(seen["tokens"])) @ self.word(torch.as_tensor(seen["question"])).mT
        return match.masked_fill(torch.as_tensor(seen["question_mask"])[..., None, :] == 0, -30).logsumexp(-1)

    def select(self, seen):  # the whole interface of a policy: return a bool mask over the tokens
        return keep_best(self(seen).detach().numpy(), seen)


torch.manual_seed(0)
vlm, task, steps = grip_env.load_vlm("tiny"), grip_env.SceneTask(), int((sys.argv[1:] or [150])[0])
envs = gymnasium.make_vec("GRIP/TokenSelection-v0", num_envs=64, vlm=vlm, task=task, budget=0.1)
policy, (seen, _) = Matcher(vlm.width), envs.reset(seed=0)
optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
for step in range(steps):
    subsets = KSubset(policy(seen), 14, mask=torch.as_tensor(seen["token_mask"]))  # a tenth of 144 tokens
    action = subsets.sample()
    seen, reward, *_ = envs.step(action.numpy())
    optimizer.zero_grad()
    (-torch.as_tensor(reward - reward.mean()) * subsets.log_prob(action)).mean().backward()
    optimizer.step()
    if step % 25 == 0:
        print(f"step {step}: reward {reward.mean():.3f}")
methods = {"my policy": policy, "random": BASELINES["random"], "oracle": BASELINES["oracle"]}
print(compare(vlm, task, methods, split="validation", examples=96, budgets=(0.05, 0.1, 0.2)).markdown())
