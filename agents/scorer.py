"""The network that scores visual tokens, given the question and the budget."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from agents.ordered_subset import OrderedSubset
from agents.subset import KSubset
from grip_env.common.atomic_files import write_atomically
from grip_env.common.finite import NonFiniteError, check_finite
from grip_env.common.json_types import check_types
from grip_env.common.sealed_files import seal, unseal
from grip_env.vlms.base import Encoded
from grip_env.vlms.flops import layer_flops

__all__ = ["Interaction", "Scorer", "ScorerConfig", "ScorerInputs", "selector_flops"]

SEAL = "scorer"


@dataclass(frozen=True)
class ScorerConfig:
    """Sizes and options of the scorer."""

    token_width: int = 128
    """Width D of the visual tokens and question embeddings, given by the vision-language model."""
    width: int = 96
    """Width of the scorer's own layers."""
    blocks: int = 2
    """Number of decoder blocks: self-attention over the tokens, cross-attention to the question, feed-forward."""
    heads: int = 4
    """Number of attention heads."""
    use_question: bool = True
    """Use the question; if False, the agent learns which tokens matter for any question."""
    in_turn: bool = False
    """Choose tokens one after another, each choice depending on the earlier ones
    (:class:`~agents.ordered_subset.OrderedSubset`), instead of jointly by their scores
    (:class:`~agents.subset.KSubset`)."""
    pair_width: int = 16
    """Width of the features that compare two tokens if tokens are chosen one after another."""

    @classmethod
    def read(cls, values: Any, weights: Mapping[str, torch.Tensor], prefix: str = "") -> ScorerConfig:
        """Return the configuration from a file, checked against the weights stored with it.

        The check ensures that no network of any other size is built.

        Args:
            values: Values by name, as read from JSON.
            weights: Weights by their names in :class:`Scorer`, preceded by ``prefix``.
            prefix: Prefix of the names, for scorers that are part of a network.

        Raises:
            ValueError: If a key is unknown, or a value has the wrong type or does not fit the weights.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or not values.keys() <= set(names):
            raise ValueError(f"its configuration has other keys than {', '.join(names)}")
        check_types(values, cls, "")
        config = cls(**values)
        shapes = {"embed_in.1.weight": (config.width, config.token_width)}
        if config.in_turn:
            shapes["interaction.pair.weight"] = (2 * config.pair_width, config.width)
        blocks = {name[len(prefix) :].split(".")[1] for name in weights if name.startswith(f"{prefix}blocks.")}
        found = {name: tuple(weights[prefix + name].shape) for name in shapes if prefix + name in weights}
        if found != shapes or len(blocks) != config.blocks or not 0 < config.heads <= config.width:
            raise ValueError("its configuration does not fit its weights")
        return config


class ScorerInputs(NamedTuple):
    """Inputs of a scorer for B examples, as described in :meth:`Scorer.forward`."""

    tokens: torch.Tensor
    positions: torch.Tensor
    token_mask: torch.Tensor
    question: torch.Tensor
    question_mask: torch.Tensor
    budget: torch.Tensor

    @classmethod
    def of(cls, encoded: Encoded, counts: torch.Tensor) -> ScorerInputs:
        """Return the inputs for encoded examples at the given counts, long (B,)."""
        return cls(
            encoded.tokens.float(),
            encoded.positions.float(),
            encoded.token_mask,
            encoded.question.float(),
            encoded.question_mask,
            (counts / encoded.token_mask.sum(1)).float(),
        )


def _match_and_pass_on(attention: nn.MultiheadAttention) -> None:
    """Initialise attention so that queries match keys of similar content and copy their values.

    Tokens then learn in a fraction of the steps to attend to the words that name them. After Trockman & Kolter,
    "Mimetic initialization of self-attention layers", 2023.
    """
    width = attention.embed_dim
    match, content = (nn.init.orthogonal_(torch.empty(width, width)) for _ in range(2))
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([match, match, 0.7 * content]))
        attention.out_proj.weight.copy_(0.7 * content.T)


class Interaction(nn.Module):
    """Network for the interactions of tokens that are chosen one after another.

    Choosing a token lowers the score of another by more, the nearer and the more alike the two are.

    Args:
        width: Width of the tokens' features.
        pair_width: Width of the features that are compared.
    """

    def __init__(self, width: int, pair_width: int) -> None:
        super().__init__()
        self.strength = nn.Linear(width, 1)
        self.pair = nn.Linear(width, 2 * pair_width, bias=False)
        # initially 2 at distance 0, and half of that at 0.16 of the image side
        nn.init.zeros_(self.strength.weight)
        nn.init.constant_(self.strength.bias, math.log(math.exp(2) - 1))
        self.log_reach = nn.Parameter(torch.tensor(math.log(0.133)))

    def forward(self, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the amount that choosing j subtracts from the score of i, float (B, N, N).

        The amount for example b is at [b, i, j].

        Args:
            features: float (B, N, W).
            positions: float (B, N, 2) in [0, 1].
        """
        asks, answers = self.pair(features).chunk(2, -1)
        alike = 2 * (asks @ answers.transpose(1, 2) / math.sqrt(asks.shape[-1])).sigmoid()
        along, across = (part[:, :, None] - part[:, None] for part in positions.unbind(-1))
        apart = along.square() + across.square()  # summing over an axis of size 2 takes several times as long
        near = (-0.5 * apart * (-2 * self.log_reach).exp()).exp()
        return nn.functional.softplus(self.strength(features)) * alike * near


class Scorer(nn.Module):
    """Network that maps visual tokens, question and budget to one score per token.

    It is permutation-equivariant over tokens with their positions, so that it can score any number of tokens in any
    order. One set of weights serves every budget.

    Args:
        config: Sizes and options.
    """

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        # visual tokens and words share the language model's input space, so one projection serves both
        self.embed_in = nn.Sequential(nn.LayerNorm(config.token_width), nn.Linear(config.token_width, width))
        self.position_in = nn.Sequential(nn.Linear(2 * 2 * 6, width), nn.GELU(), nn.Linear(width, width))
        self.budget_in = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width))
        self.question_place = nn.Parameter(torch.randn(64, width) * 0.02)
        layer: dict[str, Any] = {
            "d_model": width,
            "nhead": config.heads,
            "dim_feedforward": 2 * width,
            "dropout": 0.0,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        self.question_encoder = nn.TransformerEncoderLayer(**layer)
        self.blocks = nn.ModuleList(nn.TransformerDecoderLayer(**layer) for _ in range(config.blocks))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        nn.init.zeros_(self.out[1].weight)  # type: ignore[arg-type]  # starts as uniform sampling
        for block in self.blocks:
            _match_and_pass_on(block.multihead_attn)  # type: ignore[arg-type]
        # created last, so that the other weights of a seed do not depend on it
        self.interaction = Interaction(width, config.pair_width) if config.in_turn else None

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        token_mask: torch.Tensor,
        question: torch.Tensor,
        question_mask: torch.Tensor,
        budget: torch.Tensor,
    ) -> torch.Tensor:
        """Score tokens.

        Args:
            tokens: float (B, N, D).
            positions: float (B, N, 2) in [0, 1].
            token_mask: bool (B, N).
            question: float (B, Q, D); its first 64 tokens are read.
            question_mask: bool (B, Q).
            budget: float (B,), the share of tokens to keep.

        Returns:
            float (B, N); padding gets 0.

        Raises:
            ValueError: If the width of the tokens is not that of the scorer.
        """
        features = self.features(tokens, positions, token_mask, question, question_mask, budget)
        return self.rate(features, token_mask)

    def rate(self, features: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        """Return scores, float (B, N), for features (B, N, W); padding gets 0."""
        return self.out(features)[..., 0].masked_fill(~token_mask, 0.0)

    def features(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        token_mask: torch.Tensor,
        question: torch.Tensor,
        question_mask: torch.Tensor,
        budget: torch.Tensor,
        more: torch.Tensor | float = 0.0,
    ) -> torch.Tensor:
        """Return the scorer's features of each token, float (B, N, W).

        W is the scorer's own width. Values at padding are arbitrary. The arguments are those of :meth:`forward`, and
        ``more``, further features of each token, (B, N, W), which are added to its embedding.
        """
        if tokens.shape[-1] != self.config.token_width:
            raise ValueError(
                f"this scorer was made for visual tokens of width {self.config.token_width}, and these have "
                f"{tokens.shape[-1]}: train one for this model"
            )
        angles = positions[..., None] * (math.pi * 2.0 ** torch.arange(6, device=positions.device))  # (B, N, 2, 6)
        waves = torch.cat([angles.sin(), angles.cos()], -1).flatten(2)
        scale = torch.stack([budget, budget.log()], -1)  # (B, 2)
        real = token_mask[..., None].to(tokens.dtype)
        # the mean token of an image does not tell tokens apart, and in some models it outweighs the differences
        tokens = tokens - (tokens * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
        x = self.embed_in(tokens) + self.position_in(waves) + self.budget_in(scale)[:, None] + more
        question, question_mask = question[:, :64], question_mask[:, :64]
        if not self.config.use_question:
            question_mask = torch.zeros_like(question_mask)
        # one position that is never masked, for hidden or empty questions
        words = self.embed_in(question) + self.question_place[: question.shape[1]]
        memory = torch.cat([words.new_zeros(len(x), 1, x.shape[-1]), words], 1)
        hidden = torch.cat([question_mask.new_zeros(len(x), 1), ~question_mask], 1)
        memory = self.question_encoder(memory, src_key_padding_mask=hidden)
        padding = None if bool(token_mask.all()) else ~token_mask
        for block in self.blocks:
            x = block(x, memory, tgt_key_padding_mask=padding, memory_key_padding_mask=hidden)
        return x

    def score(self, encoded: Encoded, counts: torch.Tensor) -> torch.Tensor:
        """Score the tokens of encoded examples at the given counts (B,): float (B, N).

        Raises:
            NonFiniteError: If a score is NaN or infinite.
        """
        return _finite(self(*ScorerInputs.of(encoded, counts)))

    def policy(self, encoded: Encoded, counts: torch.Tensor, temperature: float = 1.0) -> KSubset | OrderedSubset:
        """Return the distribution over selections of encoded examples, as set by ``in_turn``.

        Args:
            encoded: B examples.
            counts: Number of tokens to keep, long (B,).
            temperature: Divisor of scores and interactions.
        """
        return self.decide(ScorerInputs.of(encoded, counts), counts, temperature)

    def decide(self, inputs: ScorerInputs, counts: torch.Tensor, temperature: float = 1.0) -> KSubset | OrderedSubset:
        """Return the distribution over selections for given inputs; see :meth:`policy`."""
        features = self.features(*inputs)
        scores = _finite(self.rate(features, inputs.token_mask) / temperature)
        if self.interaction is None:
            return KSubset(scores, counts, mask=inputs.token_mask, validate_args=False)
        return OrderedSubset(
            scores, self.interaction(features, inputs.positions) / temperature, counts, inputs.token_mask
        )

    def check_in_turn(self, wanted: bool) -> None:
        """Raise ValueError unless the scorer's ``in_turn`` is the one wanted."""
        if wanted != self.config.in_turn:
            raise ValueError(
                f"in_turn={wanted}, and the scorer was made with in_turn={self.config.in_turn}: give both the same"
            )

    def check_width(self, width: int, folder: Path, vlm: str) -> None:
        """Raise ValueError unless the scorer's token width is ``width``.

        Args:
            width: Width of the visual tokens of ``vlm``.
            folder: Folder of the scorer, for the message.
            vlm: Name of the model, for the message.
        """
        if self.config.token_width != width:
            raise ValueError(
                f"the agent in {folder} was made for visual tokens of width {self.config.token_width}, and those of "
                f"{vlm!r} have {width}: train an agent for this model with `python -m grip_env.train --vlm {vlm}`"
            )

    def save(self, folder: Path) -> None:
        """Write ``scorer.safetensors`` and ``scorer.json`` into a folder.

        A crash while writing leaves the previous files intact. The first file holds the weights, the configuration and
        a digest of both; the second repeats the configuration for human readers.

        Raises:
            NonFiniteError: If a weight is NaN or infinite; nothing is written in that case.
            OSError: If the files cannot be written.
        """
        weights = self.state_dict()
        check_finite(weights, "the scorer")
        config = json.dumps(asdict(self.config), indent=2) + "\n"
        write_atomically(folder / "scorer.json", config.encode())
        write_atomically(folder / "scorer.safetensors", seal(SEAL, weights, {"config": config}))

    @classmethod
    def load(cls, folder: Path) -> Scorer:
        """Load a scorer that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no scorer in ``folder``.
            ValueError: If the files cannot be read, or differ from those that were written.
        """
        if not (folder / "scorer.json").is_file() or not (folder / "scorer.safetensors").is_file():
            raise FileNotFoundError(f"no scorer in {folder}: expected scorer.json and scorer.safetensors")
        try:
            weights, texts = unseal(SEAL, (folder / "scorer.safetensors").read_bytes())
            if (folder / "scorer.json").read_bytes() != texts["config"].encode():
                raise ValueError("scorer.json is not the one that was written with the weights")
            scorer = cls(ScorerConfig.read(json.loads(texts["config"]), weights))
            scorer.load_state_dict(weights)
            check_finite(weights, "it")
        except (KeyError, ValueError, TypeError, RuntimeError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
            raise ValueError(f"the scorer in {folder} is damaged ({reason}): train it again or copy it anew") from error
        return scorer.eval()


def _finite(scores: torch.Tensor) -> torch.Tensor:
    if not bool(scores.detach().isfinite().all()):
        raise NonFiniteError("scores of the scorer are NaN or infinite: try a lower learning rate")
    return scores


def selector_flops(config: ScorerConfig, words: int, tokens: int) -> int:
    """Return the FLOPs of a scorer on ``tokens`` visual and ``words`` question tokens."""
    width, memory = config.width, words + 1
    embed = 2 * (tokens + words) * config.token_width * width
    positions = 2 * tokens * (24 * width + width**2) + 2 * (2 * width + width**2)
    question = layer_flops(memory, width, 4 * width)
    cross = 2 * (2 * tokens + 2 * memory) * width**2 + 4 * tokens * memory * width
    blocks = config.blocks * (layer_flops(tokens, width, 4 * width) + cross)
    pairs = 2 * tokens * (width + 2 * width * config.pair_width + tokens * config.pair_width) * config.in_turn
    return embed + positions + question + blocks + pairs + 2 * tokens * width
