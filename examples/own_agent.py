"""A user-defined agent that the commands train, save, draw and compare like any other.

Run it with:

cd examples && python -m grip_env.train --algo own_agent:Matcher --agent.steps 150
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from agents import KSubset, Metrics, Setting, keep_best
from grip_env import FrozenVLM


@dataclass
class MatcherOptions:
    """Options of :class:`Matcher`, which is trained with REINFORCE."""

    steps: int = 150
    """Number of updates."""
    num_envs: int = 64
    """Number of episodes per update."""
    learning_rate: float = 3e-3
    """Learning rate of Adam."""


class Matcher(torch.nn.Module):
    """Policy that scores each token by its best match among the words of the question."""

    Options = MatcherOptions

    def __init__(self, setting: Setting, options: MatcherOptions) -> None:
        super().__init__()
        self.setting, self.options = setting, options
        self.phases = {"reinforce": options.steps}  # for the progress bar
        width = setting.vlm.width
        self.token, self.word = torch.nn.Linear(width, 32), torch.nn.Linear(width, 32)

    def forward(self, seen: dict[str, np.ndarray]) -> torch.Tensor:
        match = self.token(torch.as_tensor(seen["tokens"])) @ self.word(torch.as_tensor(seen["question"])).mT
        return match.masked_fill(torch.as_tensor(seen["question_mask"])[..., None, :] == 0, -30).logsumexp(-1)

    def select(self, seen: dict[str, np.ndarray]) -> np.ndarray:
        return keep_best(self(seen).detach().numpy(), seen)

    def learn(self) -> Iterator[Metrics]:
        envs = self.setting.make_vec(num_envs=self.options.num_envs, budget=(0.03, 0.5))
        optimizer = torch.optim.Adam(self.parameters(), lr=self.options.learning_rate)
        seen, _ = envs.reset(seed=self.setting.seed)
        for step in range(self.options.steps):
            kept = torch.as_tensor(seen["budget"][:, 0] * seen["token_mask"].sum(1)).round().long()
            subsets = KSubset(self(seen), kept, mask=torch.as_tensor(seen["token_mask"]))
            action = subsets.sample()
            seen, reward, *_ = envs.step(action.numpy().astype(np.int8))
            loss = -(torch.as_tensor(reward - reward.mean()).float() * subsets.log_prob(action)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield Metrics("reinforce", step, {"reward": float(reward.mean())})

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "matcher.pt")

    @classmethod
    def load(cls, folder: Path, vlm: FrozenVLM) -> "Matcher":
        agent = cls(Setting(vlm, None, None), MatcherOptions())  # type: ignore[arg-type] # not needed to choose tokens
        agent.load_state_dict(torch.load(folder / "matcher.pt", weights_only=True))
        return agent
