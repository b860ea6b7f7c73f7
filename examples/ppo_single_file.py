"""PPO in a single file, in the style of CleanRL.

The agent picks visual tokens one by one (``GRIP/SequentialSelection-v0``); the policy masks tokens already taken.
Run with ``python examples/ppo_single_file.py`` (a few minutes on two CPU cores); ``--help`` lists the options.

Schulman et al., "Proximal policy optimization algorithms", 2017; Huang et al., "CleanRL: high-quality single-file
implementations of deep reinforcement learning algorithms", JMLR 2022.
"""

import time
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
import tyro
from torch import nn

import grip_env
from agents import BASELINES
from grip_env import compare


@dataclass
class Args:
    """Train PPO on token-by-token selection."""

    seed: int = 0
    """Seed of the network, the actions and the episodes."""
    budget: float = 0.05
    """Share of the visual tokens to keep; an episode has one step for each kept token."""
    iterations: int = 60
    """Number of policy updates."""
    num_envs: int = 64
    """Number of parallel environments; the frozen model scores all of them in one call."""
    num_steps: int = 14
    """Number of steps in each environment between two updates."""
    learning_rate: float = 2e-3
    """Initial learning rate of Adam; falls linearly to 0."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation. There is no discount, as rewards sum to that of the final set."""
    epochs: int = 4
    """Number of passes over the data of an update."""
    minibatches: int = 4
    """Number of minibatches per pass."""
    clip: float = 0.2
    """Clipping range of the probability ratio around 1."""
    entropy: float = 0.002
    """Weight of the entropy bonus."""
    value: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Norm to which gradients are clipped."""
    examples: int = 96
    """Number of validation examples for the final table."""


class Agent(nn.Module):
    """Policy and value network, shared by all tokens.

    Each token sees the others through their mean, so that any number of tokens works, in any order.
    """

    def __init__(self, token_width: int, width: int = 64) -> None:
        super().__init__()
        self.token = nn.Linear(token_width + 3, width)  # a token, its position, and whether it is taken
        self.word = nn.Sequential(nn.Linear(token_width, width), nn.Tanh(), nn.Linear(width, width))
        self.body = nn.Sequential(nn.Linear(4 * width, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.actor, self.critic = nn.Linear(width, 1), nn.Linear(width, 1)
        nn.init.zeros_(self.actor.weight)  # starts as a uniform policy

    def forward(self, obs: dict[str, torch.Tensor]) -> tuple[torch.distributions.Categorical, torch.Tensor]:
        """Return the policy over the tokens that can be taken, and the value, (B,)."""
        real, taken = obs["token_mask"].bool(), obs["selected"].bool()  # (B, N)
        places = torch.cat([obs["positions"], taken[..., None].float()], -1)
        x = self.token(torch.cat([obs["tokens"], places], -1)).tanh()  # (B, N, W)
        question = mean(self.word(obs["question"]), obs["question_mask"].bool())[:, None].expand_as(x)
        everything, chosen = (mean(x, which)[:, None].expand_as(x) for which in (real, taken))
        h = self.body(torch.cat([x, x * question, question * everything, chosen], -1))  # (B, N, W)
        logits = self.actor(h)[..., 0].masked_fill(~real | taken, -1e9)
        return torch.distributions.Categorical(logits=logits), self.critic(mean(h, real))[:, 0]

    def select(self, seen: dict[str, np.ndarray]) -> np.ndarray:
        """Take the likeliest token until the budget is used; return a bool mask, (N,)."""
        obs = {key: torch.as_tensor(value)[None] for key, value in seen.items()}
        obs["selected"] = torch.zeros_like(obs["token_mask"])
        for _ in range(round(float(obs["budget"] * obs["token_mask"].sum()))):
            with torch.no_grad():
                obs["selected"][0, self(obs)[0].logits.argmax()] = 1
        return obs["selected"][0].bool().numpy()


def mean(x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Return the mean, (B, W), of the rows of x, (B, M, W), where a mask is True; 0 if none."""
    return (x * which[..., None]).sum(1) / which.sum(1, keepdim=True).clamp_min(1)


args = tyro.cli(Args)
torch.manual_seed(args.seed)
vlm, task = grip_env.load_vlm("tiny"), grip_env.SceneTask()
envs = gymnasium.make_vec("GRIP/SequentialSelection-v0", num_envs=args.num_envs, vlm=vlm, task=task, budget=args.budget)
agent = Agent(vlm.width)
optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

# storage: T steps in B environments
shape = (args.num_steps, args.num_envs)
space = envs.single_observation_space
obs = {key: torch.zeros(*shape, *part.shape) for key, part in space.items()}  # (T, B, ...)
actions = torch.zeros(shape, dtype=torch.long)
logprobs, rewards, dones, values = (torch.zeros(shape) for _ in range(4))

seen, _ = envs.reset(seed=args.seed)
done = torch.zeros(args.num_envs)
started = time.time()
for iteration in range(args.iterations):
    optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / args.iterations)

    # rollout; an environment whose episode has ended starts the next one in the same step
    ended = []
    for step in range(args.num_steps):
        for key, part in seen.items():
            obs[key][step] = torch.as_tensor(part)
        dones[step] = done
        with torch.no_grad():
            policy, values[step] = agent({key: part[step] for key, part in obs.items()})
        actions[step] = policy.sample()
        logprobs[step] = policy.log_prob(actions[step])
        seen, reward, terminated, truncated, infos = envs.step(actions[step].numpy())
        rewards[step], done = torch.as_tensor(reward), torch.as_tensor(terminated | truncated).float()
        if terminated.any():
            last = infos["final_info"]
            ended += zip(last["log_likelihood"][terminated], last["correct"][terminated], strict=True)

    # advantages
    with torch.no_grad():
        next_value = agent({key: torch.as_tensor(part).float() for key, part in seen.items()})[1]
    advantages = torch.zeros(shape)
    carried = torch.zeros(args.num_envs)
    for step in reversed(range(args.num_steps)):
        after, over = (next_value, done) if step == args.num_steps - 1 else (values[step + 1], dones[step + 1])
        delta = rewards[step] + after * (1 - over) - values[step]
        advantages[step] = carried = delta + args.gae_lambda * (1 - over) * carried
    returns = advantages + values

    # update
    flat = {key: part.flatten(0, 1) for key, part in obs.items()}  # (T * B, ...)
    for _ in range(args.epochs):
        for rows in torch.randperm(actions.numel()).chunk(args.minibatches):
            policy, value = agent({key: part[rows] for key, part in flat.items()})
            logratio = policy.log_prob(actions.flatten()[rows]) - logprobs.flatten()[rows]
            advantage = advantages.flatten()[rows]
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            clipped = logratio.exp().clamp(1 - args.clip, 1 + args.clip)
            policy_loss = -torch.min(advantage * logratio.exp(), advantage * clipped).mean()
            value_loss = (value - returns.flatten()[rows]).square().mean() / 2
            entropy = policy.entropy().mean()
            loss = policy_loss + args.value * value_loss - args.entropy * entropy
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()

    if ended:
        likelihood, correct = np.array(ended, dtype=float).mean(0)
        print(
            f"iteration {iteration}: log-likelihood {likelihood:.3f}, accuracy {correct:.2f}, "
            f"entropy {entropy.item():.2f}, explained variance {1 - (returns - values).var() / returns.var():.2f}, "
            f"{time.time() - started:.0f} s"
        )
envs.close()

methods = {"PPO": agent, "random": BASELINES["random"], "oracle": BASELINES["oracle"]}
print(compare(vlm, task, methods, "validation", args.examples, budgets=(args.budget,)).markdown())
