"""Policies of Stable-Baselines3 that treat an image as a set of tokens, with no weight that belongs to a place in it.

The library's own ``MultiInputPolicy`` flattens an observation: millions of weights, one set for each place, and another
network for every number of tokens. Here the project's :class:`~agents.scorer.Scorer` reads the observation, each token
gets its part of the action from its own score, and the value comes from the mean over tokens. Shuffled tokens give
shuffled actions and the same value, and the number of weights does not depend on N.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import BernoulliDistribution, DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from agents.base import top_k
from agents.scorer import Scorer, ScorerConfig
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = [
    "SequentialSelector",
    "SetExtractor",
    "SetFeatures",
    "SetNetwork",
    "SetPolicy",
    "SetWise",
    "expecting",
]

_NEVER = -1e4
"""The logit of a coin that is never heads: its sigmoid is exactly 0, and 0 times it is 0."""
_ILLEGAL = -1e8
"""The logit of an illegal choice, as sb3-contrib has it."""


class SetFeatures(NamedTuple):
    """What a network makes of a batch of observations."""

    scores: torch.Tensor
    """One number for each token, float (B, N)."""
    tokens: torch.Tensor
    """Features of each, float (B, N, W)."""
    mask: torch.Tensor
    """Which tokens are real, bool (B, N)."""
    selected: torch.Tensor
    """Which are in already, bool (B, N)."""
    counts: torch.Tensor
    """How many the budget allows, long (B,)."""


class SetNetwork(nn.Module):
    """A scorer that may also be told which tokens are in already.

    Args:
        config: Sizes of the scorer.
    """

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        self.scorer = Scorer(config)
        # 0: a scorer that was warmed up without knowing of selected tokens scores as it did
        self.selected_in = nn.Parameter(torch.zeros(config.width))

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        token_mask: torch.Tensor,
        question: torch.Tensor,
        question_mask: torch.Tensor,
        budget: torch.Tensor,
        selected: torch.Tensor,
    ) -> SetFeatures:
        """Read B examples; the arguments are those of the scorer, and ``selected``, bool (B, N)."""
        more = selected[..., None] * self.selected_in
        features = self.scorer.features(tokens, positions, token_mask, question, question_mask, budget, more)
        counts = (budget * token_mask.sum(1)).round().long().clamp_min(1)
        return SetFeatures(self.scorer.rate(features, token_mask), features, token_mask, selected, counts)


class SetExtractor(BaseFeaturesExtractor):
    """Reads observations of the project's environments, one-shot or token by token.

    Args:
        observation_space: Of the environment; features of any width and precision (``feature_dim``, ``obs_dtype``).
        width: Width W of the network's layers.
        blocks: Decoder blocks.
        heads: Attention heads.

    Raises:
        ValueError: If it is the space of another kind of environment.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        width: int = ScorerConfig.width,
        blocks: int = ScorerConfig.blocks,
        heads: int = ScorerConfig.heads,
    ) -> None:
        if not isinstance(observation_space, spaces.Dict) or not {"tokens", "budget"} <= set(observation_space.spaces):
            raise ValueError(
                "a set-wise policy reads the observations of this project's environments, with tokens and a budget; "
                f"got {observation_space}"
            )
        super().__init__(observation_space, width)
        shape: Any = observation_space["tokens"].shape
        self.network = SetNetwork(ScorerConfig(token_width=shape[-1], width=width, blocks=blocks, heads=heads))

    def forward(self, observations: dict[str, torch.Tensor]) -> SetFeatures:
        """Return what the network makes of observations, float tensors with a row for each."""
        tokens = observations["tokens"]
        question = observations.get("question", tokens[:, :0])  # hidden where the environment is made that way
        words = observations.get("question_mask", question[..., 0]).bool()
        # room that no question of the batch takes costs as much as words do
        question, words = (part[:, : _length(words)] for part in (question, words))
        mask = observations["token_mask"].bool()
        selected = observations["selected"].bool() if "selected" in observations else torch.zeros_like(mask)
        budget = observations["budget"][:, 0]
        features: SetFeatures = self.network(tokens, observations["positions"], mask, question, words, budget, selected)
        return features


def _length(mask: torch.Tensor) -> int:
    """Return how many columns of a mask, bool (B, Q), there are up to the last that has anything in it."""
    used = mask.any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def expecting(scores: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shift the scores of each row so that independent coins with these logits show ``counts`` heads on average.

    Given that k coins are heads, they have the k-subset law of the scores (:class:`~agents.subset.KSubset`), so that a
    policy of coins starts out from a warmed-up scorer as GRPO's does. Gradients flow through the shift as well.

    Args:
        scores: float (B, N).
        counts: long (B,).
        mask: Which tokens are real, bool (B, N).

    Returns:
        Logits, float (B, N); those of padding are -10,000. Where all tokens are to be kept, half a token is missing
        on average, as coins that are sure have infinite logits.

    >>> mask = torch.tensor([[True, True, True, False]])
    >>> logits = expecting(torch.tensor([[0.0, 1.0, 5.0, 9.0]]), torch.tensor([2]), mask)
    >>> [round(float(coin), 3) for coin in logits.sigmoid()[0]]
    [0.383, 0.628, 0.989, 0.0]
    """
    target = torch.minimum(counts.to(scores.dtype), mask.sum(1) - 0.5)[:, None]  # (B, 1)
    fixed = scores.detach()
    low = -fixed.masked_fill(~mask, -torch.inf).amax(1, keepdim=True) - 20
    high = -fixed.masked_fill(~mask, torch.inf).amin(1, keepdim=True) + 20
    for _ in range(24):  # some 40 wide and more at first, and then a millionth of that
        middle = (low + high) / 2
        enough = ((fixed + middle).sigmoid() * mask).sum(1, keepdim=True) >= target
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    shift = (low + high) / 2
    coins = (scores + shift).sigmoid() * mask
    slope = (coins * (1 - coins)).sum(1, keepdim=True).detach().clamp_min(1e-6)
    # a step of Newton's method, which changes the value by next to nothing and has the gradient of the exact shift
    shift = shift - (coins.sum(1, keepdim=True) - target) / slope
    return (scores + shift).masked_fill(~mask, _NEVER)


class _Coins(BernoulliDistribution):
    """A coin for each token; the mode keeps exactly as many as the budget allows."""

    counts: torch.Tensor
    mask: torch.Tensor

    def mode(self) -> torch.Tensor:
        """Return the best selection within the budget, float (B, N) of 0 and 1."""
        logits: torch.Tensor = self.distribution.logits
        return top_k(logits, self.counts, self.mask).to(logits.dtype)


class _KeepHead(nn.Module):
    """Binary actions: a coin for each token, as many heads as the budget allows on average."""

    def __init__(self) -> None:
        super().__init__()
        # to keep more or fewer than the budget allows may pay: what is over is dropped at random
        self.lean = nn.Parameter(torch.zeros(()))

    def forward(self, features: SetFeatures, distribution: _Coins) -> Distribution:
        distribution.counts, distribution.mask = features.counts, features.mask
        logits = expecting(features.scores, features.counts, features.mask) + self.lean
        return distribution.proba_distribution(logits.masked_fill(~features.mask, _NEVER))


class _ScoreHead(nn.Module):
    """Real-valued actions in [-1, 1], of which the environment keeps the k highest."""

    def __init__(self, log_std: float) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.tensor(log_std))  # one for all tokens, whatever their number

    def forward(self, features: SetFeatures, distribution: DiagGaussianDistribution) -> Distribution:
        scores, mask = features.scores, features.mask
        centred = scores - scores.sum(1, keepdim=True) / mask.sum(1, keepdim=True)  # padding scores 0
        # within +-0.6, so that noise seldom reaches the bounds, where actions are clipped and ties arise. A unit of
        # score is 0.1 at most: a deviation of e^-2 is 1.35 units, about that of the Gumbel noise (1.28) whose k highest
        # make a draw without replacement
        mean = (0.6 * nn.functional.softsign(centred / 6)).masked_fill(~mask, 0.0)
        # what is drawn for padding has no effect and must not teach: constants
        return distribution.proba_distribution(mean, self.log_std * mask)


class _IndexHead(nn.Module):
    """The index of one token that is real and not selected yet."""

    def forward(self, features: SetFeatures, distribution: Any) -> Any:
        legal = features.mask & ~features.selected
        return distribution.proba_distribution(action_logits=features.scores.masked_fill(~legal, _ILLEGAL))


class _ValueHead(nn.Module):
    """The value of an observation: from the mean of its tokens' features (Zaheer et al., "Deep sets", NeurIPS 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, features: SetFeatures) -> torch.Tensor:
        real = features.mask[..., None].to(features.tokens.dtype)
        value: torch.Tensor = self.out((features.tokens * real).sum(1) / real.sum(1).clamp_min(1))
        return value


class _Both(nn.Module):
    """Stands where the library has separate layers for actor and critic: both get the features as they are."""

    def forward(self, features: SetFeatures) -> tuple[SetFeatures, SetFeatures]:
        return features, features

    def forward_actor(self, features: SetFeatures) -> SetFeatures:
        return features

    def forward_critic(self, features: SetFeatures) -> SetFeatures:
        return features


class SetWise:
    """What makes an actor-critic policy of Stable-Baselines3, which comes after it in the bases, a set-wise one.

    Args:
        arguments: Those of the other base. ``features_extractor_kwargs`` has the sizes of :class:`SetExtractor`, and
            ``log_std_init`` (-2 by default) is for action_mode="scores".
        named: As well.

    Raises:
        ValueError: If the action space is none of those of this project's environments.
    """

    action_dist: Any
    action_net: Any
    mlp_extractor: Any
    value_net: Any

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **({"features_extractor_class": SetExtractor} | named))

    def _build(self: Any, lr_schedule: Any) -> None:
        space, width = self.action_space, self.features_extractor.features_dim
        self.mlp_extractor, self.value_net = _Both(), _ValueHead(width)
        if isinstance(space, spaces.MultiBinary):
            count: Any = space.n
            self.action_dist, self.action_net = _Coins(count), _KeepHead()
        elif isinstance(space, spaces.Discrete):
            self.action_net = _IndexHead()
        elif isinstance(space, spaces.Box):
            self.action_net = _ScoreHead(self.log_std_init)
        else:
            raise ValueError(f"a set-wise policy has binary, real-valued or discrete actions; got {space}")
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_action_dist_from_latent(self, latent_pi: Any) -> Any:
        return self.action_net(latent_pi, self.action_dist)


class SetPolicy(SetWise, ActorCriticPolicy):
    """A set-wise policy for PPO and A2C: ``PPO(SetPolicy, grip_env.as_sb3_vec_env(envs))``.

    ``predict(..., deterministic=True)`` keeps exactly as many tokens as the budget allows in both action modes.

    Args:
        arguments: Those of ``ActorCriticPolicy``; see :class:`SetWise`.
        named: As well.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **({"log_std_init": -2.0} | named))


class SequentialSelector:
    """Adds the best token until the budget is used, for a whole batch at once and without asking the language model.

    Args:
        network: Of a policy that was trained token by token.
    """

    def __init__(self, network: SetNetwork) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens; see :class:`agents.base.Selector`. Takes max(kept) passes of the network."""
        mask = encoded.token_mask
        chosen, one = torch.zeros_like(mask), torch.ones_like(counts)
        seen = (encoded.tokens.float(), encoded.positions.float(), mask, encoded.question.float())
        budget = (counts / mask.sum(1)).float()
        for step in range(int(counts.max())):
            features: SetFeatures = self.network(*seen, encoded.question_mask, budget, chosen)
            chosen = chosen | top_k(features.scores, one, mask & ~chosen) & (step < counts)[:, None]
        return chosen
