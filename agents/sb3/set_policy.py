"""Stable-Baselines3 policies that treat an image as a set of tokens.

The library's ``MultiInputPolicy`` flattens an observation: it has millions of weights, separate ones for each position,
and needs a different network for every number of tokens. Here :class:`~agents.scorer.Scorer` reads the observation, the
action for each token depends on its own score, and the value comes from the mean over tokens. Actions are equivariant
and the value is invariant to permutations of the tokens, and the number of weights does not depend on N.
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
"""Logit of a token that is never kept: its sigmoid is exactly 0, and 0 times it is 0."""
_ILLEGAL = -1e8
"""Logit of an illegal choice, as in sb3-contrib."""


class SetFeatures(NamedTuple):
    """Output of a network for a batch of observations."""

    scores: torch.Tensor
    """Score of each token, float (B, N)."""
    tokens: torch.Tensor
    """Features of each token, float (B, N, W)."""
    mask: torch.Tensor
    """Mask of the real tokens, bool (B, N)."""
    selected: torch.Tensor
    """Mask of the tokens already selected, bool (B, N)."""
    counts: torch.Tensor
    """Number of tokens that the budget allows, long (B,)."""


class SetNetwork(nn.Module):
    """Scorer with an additional input: the tokens already selected.

    Args:
        config: Sizes of the scorer.
    """

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        self.scorer = Scorer(config)
        # 0: a scorer that was warmed up without selected tokens keeps its scores
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
        """Score the tokens of B examples.

        The arguments are the scorer's and ``selected``, bool (B, N).
        """
        more = selected[..., None] * self.selected_in
        features = self.scorer.features(tokens, positions, token_mask, question, question_mask, budget, more)
        counts = (budget * token_mask.sum(1)).round().long().clamp_min(1)
        return SetFeatures(self.scorer.rate(features, token_mask), features, token_mask, selected, counts)


class SetExtractor(BaseFeaturesExtractor):
    """Feature extractor for observations of the project's environments.

    It works with the one-shot and the token-by-token environment.

    Args:
        observation_space: Space of the environment; features may have any width and precision (``feature_dim``,
            ``obs_dtype``).
        width: Width W of the network's layers.
        blocks: Number of decoder blocks.
        heads: Number of attention heads.

    Raises:
        ValueError: If the space is from another kind of environment.
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
        """Return the network's output for observations, float tensors with a row for each."""
        tokens = observations["tokens"]
        question = observations.get("question", tokens[:, :0])  # an environment may hide the question
        words = observations.get("question_mask", question[..., 0]).bool()
        # padding beyond the longest question of the batch would cost as much as words do
        question, words = (part[:, : _length(words)] for part in (question, words))
        mask = observations["token_mask"].bool()
        selected = observations["selected"].bool() if "selected" in observations else torch.zeros_like(mask)
        budget = observations["budget"][:, 0]
        features: SetFeatures = self.network(tokens, observations["positions"], mask, question, words, budget, selected)
        return features


def _length(mask: torch.Tensor) -> int:
    """Return the number of columns of a mask, bool (B, Q), up to the last one in use."""
    used = mask.any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def expecting(scores: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shift the scores of each row to logits that keep ``counts`` tokens on average.

    The logits are of an independent Bernoulli draw for each token. Conditional on k tokens being kept, the draws have
    the k-subset distribution of the scores (:class:`~agents.subset.KSubset`), so a Bernoulli policy starts from a
    warmed-up scorer as GRPO's policy does. Gradients also flow through the shift.

    Args:
        scores: float (B, N).
        counts: long (B,).
        mask: Which tokens are real, bool (B, N).

    Returns:
        Logits, float (B, N); padding has -10,000. If all tokens are to be kept, the expected number is half a token
        less, because probabilities of 1 have infinite logits.

    >>> mask = torch.tensor([[True, True, True, False]])
    >>> logits = expecting(torch.tensor([[0.0, 1.0, 5.0, 9.0]]), torch.tensor([2]), mask)
    >>> [round(float(coin), 3) for coin in logits.sigmoid()[0]]
    [0.383, 0.628, 0.989, 0.0]
    """
    target = torch.minimum(counts.to(scores.dtype), mask.sum(1) - 0.5)[:, None]  # (B, 1)
    fixed = scores.detach()
    low = -fixed.masked_fill(~mask, -torch.inf).amax(1, keepdim=True) - 20
    high = -fixed.masked_fill(~mask, torch.inf).amin(1, keepdim=True) + 20
    for _ in range(24):  # an interval at least 40 wide shrinks to 1 / 2**24 of its width
        middle = (low + high) / 2
        enough = ((fixed + middle).sigmoid() * mask).sum(1, keepdim=True) >= target
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    shift = (low + high) / 2
    coins = (scores + shift).sigmoid() * mask
    slope = (coins * (1 - coins)).sum(1, keepdim=True).detach().clamp_min(1e-6)
    # a step of Newton's method: it hardly changes the value, and has the gradient of the exact shift
    shift = shift - (coins.sum(1, keepdim=True) - target) / slope
    return (scores + shift).masked_fill(~mask, _NEVER)


class _Coins(BernoulliDistribution):
    """A Bernoulli draw for each token; the mode keeps exactly as many as the budget allows."""

    counts: torch.Tensor
    mask: torch.Tensor

    def mode(self) -> torch.Tensor:
        """Return the best selection within the budget, float (B, N) of 0 and 1."""
        logits: torch.Tensor = self.distribution.logits
        return top_k(logits, self.counts, self.mask).to(logits.dtype)


class _KeepHead(nn.Module):
    """Head for binary actions, which keep as many tokens as the budget allows on average."""

    def __init__(self) -> None:
        super().__init__()
        # keeping more or fewer tokens than the budget allows may pay off: surplus ones are dropped at random
        self.lean = nn.Parameter(torch.zeros(()))

    def forward(self, features: SetFeatures, distribution: _Coins) -> Distribution:
        distribution.counts, distribution.mask = features.counts, features.mask
        logits = expecting(features.scores, features.counts, features.mask) + self.lean
        return distribution.proba_distribution(logits.masked_fill(~features.mask, _NEVER))


class _ScoreHead(nn.Module):
    """Head for real-valued actions in [-1, 1], of which the environment keeps the k highest."""

    def __init__(self, log_std: float) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.tensor(log_std))  # one for all tokens, whatever their number

    def forward(self, features: SetFeatures, distribution: DiagGaussianDistribution) -> Distribution:
        scores, mask = features.scores, features.mask
        centred = scores - scores.sum(1, keepdim=True) / mask.sum(1, keepdim=True)  # padding scores 0
        # within +-0.6, so that noise seldom reaches the bounds, where actions are clipped and ties arise. A unit of
        # score is 0.1 at most, so a standard deviation of e^-2 is 1.35 units, close to that of Gumbel noise (1.28),
        # with which the k highest scores are a draw without replacement
        mean = (0.6 * nn.functional.softsign(centred / 6)).masked_fill(~mask, 0.0)
        # draws for padding have no effect and must give no gradient: constants
        return distribution.proba_distribution(mean, self.log_std * mask)


class _IndexHead(nn.Module):
    """Head for the index of one token that is real and not selected yet."""

    def forward(self, features: SetFeatures, distribution: Any) -> Any:
        legal = features.mask & ~features.selected
        return distribution.proba_distribution(action_logits=features.scores.masked_fill(~legal, _ILLEGAL))


class _ValueHead(nn.Module):
    """Head for the value of an observation, from the mean of its tokens' features.

    Zaheer et al., "Deep sets", NeurIPS 2017.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, features: SetFeatures) -> torch.Tensor:
        real = features.mask[..., None].to(features.tokens.dtype)
        value: torch.Tensor = self.out((features.tokens * real).sum(1) / real.sum(1).clamp_min(1))
        return value


class _Both(nn.Module):
    """Identity in place of the library's separate layers for actor and critic."""

    def forward(self, features: SetFeatures) -> tuple[SetFeatures, SetFeatures]:
        return features, features

    def forward_actor(self, features: SetFeatures) -> SetFeatures:
        return features

    def forward_critic(self, features: SetFeatures) -> SetFeatures:
        return features


class SetWise:
    """Mixin that makes an actor-critic policy of Stable-Baselines3 set-wise.

    It comes before the library's policy in the list of base classes.

    Args:
        arguments: Positional arguments of the library's policy.
        named: Keyword arguments of the library's policy. ``features_extractor_kwargs`` has the sizes of
            :class:`SetExtractor`, and ``log_std_init`` (-2 by default in :class:`SetPolicy`) is for
            action_mode="scores".

    Raises:
        ValueError: If the action space is not from one of this project's environments.
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
        arguments: Positional arguments of ``ActorCriticPolicy``.
        named: Keyword arguments of ``ActorCriticPolicy``; see :class:`SetWise`.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **({"log_std_init": -2.0} | named))


class SequentialSelector:
    """Selector that adds the best token until the budget is used, for a whole batch together.

    It does not run the language model.

    Args:
        network: Network of a policy that was trained token by token.
    """

    def __init__(self, network: SetNetwork) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens with max(counts) passes of the network; see :class:`agents.base.Selector`."""
        mask = encoded.token_mask
        chosen, one = torch.zeros_like(mask), torch.ones_like(counts)
        seen = (encoded.tokens.float(), encoded.positions.float(), mask, encoded.question.float())
        budget = (counts / mask.sum(1)).float()
        for step in range(int(counts.max())):
            features: SetFeatures = self.network(*seen, encoded.question_mask, budget, chosen)
            chosen = chosen | top_k(features.scores, one, mask & ~chosen) & (step < counts)[:, None]
        return chosen
