"""The decoding loop: generation token by token from pruned prompts.

The pruned prompts are not passed to transformers' ``generate``. It drops an attention mask of ones, without which
position ids with gaps are read as packed sequences, and it applies settings that a checkpoint was saved with. The steps
are therefore run here, always with a mask and a cache. Around them, :func:`decode` does the same as ``generate``, with
its logits processors and stopping criteria, which see the prompts as given.

R rows, L columns of the prompts, T new tokens, V tokens in the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.generation import GenerationMixin
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor, PrefixConstrainedLogitsProcessor
from transformers.generation.utils import GenerateDecoderOnlyOutput

if TYPE_CHECKING:
    from grip_env.vlms.families.base import Family

__all__ = ["CACHE", "Prompts", "WholePrompts", "decode", "greedy", "stop_tokens"]

_PREPARES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE: str = "cache" if "cache" in _PREPARES else "past_key_values"
"""Name of the argument through which a model takes its cache of keys and values."""


@dataclass
class Prompts:
    """Pruned prompts, padded on the left."""

    ids: torch.Tensor
    """Token ids, long (R, L)."""
    mask: torch.Tensor
    """Attention mask, bool (R, L); False for padding."""
    position_ids: torch.Tensor
    """Position ids, long (R, L) or (axes, R, L)."""
    images: dict[str, Any]
    """Keyword arguments that pass the images to the model."""


def _steps(model: Any, family: Family, prompts: Prompts, cache: Any, **more: Any) -> Generator[Any, torch.Tensor, None]:
    """Yield the model's output for the prompts, then for each step's tokens (R,) sent in."""
    ids, mask, position_ids, images = prompts.ids, prompts.mask, prompts.position_ids, prompts.images
    first = True
    while True:
        inputs = model.prepare_inputs_for_generation(
            ids,
            is_first_iteration=first,
            attention_mask=mask.long(),
            position_ids=position_ids - family.first_position,  # the model adds it again
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
            **family.token_types(ids, torch.full_like(ids, not first, dtype=torch.bool)),
            **images,
            **more,
        )
        new = yield model(**inputs, return_dict=True)
        ids, mask, position_ids = (
            new[:, None],
            torch.nn.functional.pad(mask, (0, 1), value=True),
            position_ids[..., -1:] + 1,
        )
        images, first = {}, False


def new_cache(model: Any) -> Any:
    """Return an empty cache of keys and values."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def stop_tokens(model: Any) -> list[int]:
    """Return the end tokens named in the model's ``generation_config``."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return [int(end) for end in (ends if isinstance(ends, list | tuple) else [ends])]


@torch.no_grad()
def greedy(
    model: Any,
    family: Family,
    prompts: Prompts,
    most: int,
    watch: Callable[[torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue each prompt with the most likely token.

    Of the model's ``generation_config``, only the token ids have an effect.

    Args:
        model: A model of transformers.
        family: Its family.
        prompts: R prompts.
        most: Maximum number of new tokens, at least 1.
        watch: Called with each step's tokens, long (R,), in main memory.

    Returns:
        The new tokens, long (R, T), each row padded with its own end token, and the log-probability of each, float
        (R, T).
    """
    ends = torch.tensor(stop_tokens(model), dtype=torch.long, device=prompts.ids.device)
    done = torch.zeros(len(prompts.ids), dtype=torch.bool, device=prompts.ids.device)
    steps = _steps(model, family, prompts, new_cache(model))
    output = next(steps)
    tokens: list[torch.Tensor] = []
    chances: list[torch.Tensor] = []
    while True:
        chance, token = output.logits[:, -1].float().log_softmax(-1).max(-1)
        if tokens:
            token = torch.where(done, tokens[-1], token)
        tokens.append(token)
        chances.append(chance)
        if watch is not None:
            watch(token.cpu())
        done = done | torch.isin(token, ends)
        if len(tokens) == most or bool(done.all()):
            return torch.stack(tokens, 1), torch.stack(chances, 1)
        output = steps.send(token)


@dataclass
class WholePrompts:
    """Complete prompts, with all image placeholders, as the options of ``generate`` see them."""

    given: torch.Tensor
    """Token ids with the padding as given, long (R, L), for the caller's own processors and criteria."""
    filled: torch.Tensor
    """Token ids with all padding on the left, each row padded with its own first token, long (R, L).

    They are for the processors and criteria that transformers creates from options: none of these should find a token
    in a prompt only because another prompt is longer."""
    padding: list[int]
    """Number of padding tokens in each row."""
    callers: Iterable[Any] = field(default=())
    """Processors and criteria passed by the caller."""

    def before(self, reader: Any) -> torch.Tensor:
        """Return the prompts that a logits processor or stopping criterion sees, long (R, L)."""
        own = isinstance(reader, PrefixConstrainedLogitsProcessor) or any(reader is one for one in self.callers)
        return self.given if own else self.filled

    def process(self, processors: Iterable[Any], new: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Apply all logits processors to scores (R, V), after T new tokens, long (R, T)."""
        for processor in processors:
            ids = torch.cat([self.before(processor), new], 1)
            if isinstance(processor, NoRepeatNGramLogitsProcessor) and any(self.padding):
                rows = [(ids[row : row + 1, start:], scores[row : row + 1]) for row, start in enumerate(self.padding)]
                scores = torch.cat([processor(*row) for row in rows])
            else:
                scores = processor(ids, scores)
        return scores

    def finished(self, criteria: Iterable[Any], new: torch.Tensor, scores: Any) -> torch.Tensor:
        """Return which rows are finished, bool (R,)."""
        done = torch.zeros(len(new), dtype=torch.bool, device=new.device)
        for criterion in criteria:
            done = done | criterion(torch.cat([self.before(criterion), new], 1), scores)
        return done


@torch.no_grad()
def decode(
    model: Any,
    family: Family,
    prompts: Prompts,
    whole: WholePrompts,
    processors: Iterable[Any],
    criteria: Iterable[Any],
    config: Any,
    cache: Any = None,
    streamer: Any = None,
) -> Any:
    """Generate one sequence for each prompt, greedily or by sampling, as ``generate`` does.

    Args:
        model: A model of transformers.
        family: Its family.
        prompts: R pruned prompts.
        whole: The same prompts as given.
        processors: Logits processors, as ``generate`` prepares them.
        criteria: Stopping criteria, as ``generate`` prepares them.
        config: The complete ``GenerationConfig``.
        cache: An empty cache; ``None`` creates one.
        streamer: Receives the prompts as given and then each step's tokens.

    Returns:
        The same as ``generate``: the prompts as given followed by the new tokens, long (R, L + T), or an output object
        with these as its ``sequences``; everything else in it refers to the kept tokens.

    Raises:
        ValueError: If there is no token to choose from.
    """
    rows = len(prompts.ids)
    cache = new_cache(model) if cache is None else cache
    asked = [key for key in ("output_attentions", "output_hidden_states") if getattr(config, key)]
    steps = _steps(model, family, prompts, cache, **dict.fromkeys(asked, True))
    ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    filler = config.pad_token_id
    if filler is None and config.eos_token_id is not None:
        filler = config.eos_token_id[0] if isinstance(config.eos_token_id, list | tuple) else config.eos_token_id
    new = prompts.ids.new_zeros(rows, 0)
    done = torch.zeros(rows, dtype=torch.bool, device=new.device)
    kept: dict[str, tuple[Any, ...]] = {
        name: ()
        for name, wanted in (
            ("scores", config.output_scores),
            ("logits", config.output_logits),
            ("attentions", config.output_attentions),
            ("hidden_states", config.output_hidden_states),
        )
        if wanted and config.return_dict_in_generate
    }
    if streamer is not None:
        streamer.put(whole.given.cpu())
    output = next(steps)
    while True:
        logits = output.logits[:, -1].to(copy=True, dtype=torch.float32)
        scores = whole.process(processors, new, logits)
        found = {"scores": scores, "logits": logits, **{key[7:]: getattr(output, key[7:]) for key in asked}}
        kept = {name: (*values, found[name]) for name, values in kept.items()}
        token = _sampled(scores) if config.do_sample else scores.argmax(-1)
        if ends:
            token = token.masked_fill(done, filler)
        new = torch.cat([new, token[:, None]], 1)
        if streamer is not None:
            streamer.put(token.cpu())
        done = done | whole.finished(criteria, new, kept.get("scores"))
        if bool(done.all()):
            break
        output = steps.send(token)
    if streamer is not None:
        streamer.end()
    sequences: Any = torch.cat([whole.given, new], 1)
    if not config.return_dict_in_generate:
        return sequences
    more: dict[str, Any] = kept | ({CACHE: cache} if config.use_cache is not False else {})
    return GenerateDecoderOnlyOutput(sequences=sequences, **more)


def _sampled(scores: torch.Tensor) -> torch.Tensor:
    """Sample a token for each row of scores (R, V): long (R,).

    Like ``generate``, this uses PyTorch's global generator.
    """
    chances = scores.softmax(-1)
    if bool(chances.isnan().any()):
        raise ValueError("the options of generate leave no token to choose from: allow some")
    return chances.multinomial(1)[:, 0]
