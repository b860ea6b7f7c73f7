"""Token by token: how a model goes on from what is kept of its prompts.

transformers' ``generate`` is not let near the short prompts. It drops an attention mask of ones, without which gapped
positions are read as packed sequences, and it takes settings that a checkpoint was saved with. So the steps are taken
here, always with a mask and a cache. :func:`decode` does as ``generate`` does around them, with ``generate``'s own
processors of logits and stopping criteria, which look at the prompts as they were given.

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
"""Under which name a model takes its cache of keys and values."""


@dataclass
class Prompts:
    """What is kept of prompts, padded on the left."""

    ids: torch.Tensor
    """Long (R, L)."""
    mask: torch.Tensor
    """Which of them are no padding, bool (R, L)."""
    position_ids: torch.Tensor
    """Position ids, long (R, L) or (axes, R, L)."""
    images: dict[str, Any]
    """What the model is told of the images."""


def _steps(model: Any, family: Family, prompts: Prompts, cache: Any, **more: Any) -> Generator[Any, torch.Tensor, None]:
    """Yield what the model returns for the prompts, and then for each token (R,) that is sent."""
    ids, mask, position_ids, images = prompts.ids, prompts.mask, prompts.position_ids, prompts.images
    first = True
    while True:
        inputs = model.prepare_inputs_for_generation(
            ids,
            is_first_iteration=first,
            attention_mask=mask.long(),
            position_ids=position_ids - family.first_position,  # which it adds itself
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
    """Return the tokens that end an answer, as the model's ``generation_config`` names them."""
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
    """Go on with the likeliest token, whatever the model's ``generation_config`` says of anything but token ids.

    Args:
        model: A model of transformers.
        family: Its family.
        prompts: R prompts.
        most: Most new tokens, at least 1.
        watch: Called with each step's tokens, long (R,), in main memory.

    Returns:
        The new tokens, long (R, T), each row filled up with its own end, and the log-probability of each, float (R, T).
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
    """Prompts as they were given, all image placeholders included: what options of ``generate`` look at."""

    given: torch.Tensor
    """With padding as it was, long (R, L): for what the caller brought along."""
    filled: torch.Tensor
    """With all padding on the left, and each row's own first token as padding, long (R, L): for what transformers
    makes of options, none of which should find a token in a prompt because another prompt is longer."""
    padding: list[int]
    """How much padding each row has."""
    callers: Iterable[Any] = field(default=())
    """Processors and criteria that the caller brought along."""

    def before(self, reader: Any) -> torch.Tensor:
        """Return the prompts as a processor of logits or a stopping criterion shall see them, long (R, L)."""
        own = isinstance(reader, PrefixConstrainedLogitsProcessor) or any(reader is one for one in self.callers)
        return self.given if own else self.filled

    def process(self, processors: Iterable[Any], new: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores (R, V) after all processors of logits, with T new tokens so far, long (R, T)."""
        for processor in processors:
            ids = torch.cat([self.before(processor), new], 1)
            if isinstance(processor, NoRepeatNGramLogitsProcessor) and any(self.padding):
                rows = [(ids[row : row + 1, start:], scores[row : row + 1]) for row, start in enumerate(self.padding)]
                scores = torch.cat([processor(*row) for row in rows])
            else:
                scores = processor(ids, scores)
        return scores

    def finished(self, criteria: Iterable[Any], new: torch.Tensor, scores: Any) -> torch.Tensor:
        """Return which rows are at their end, bool (R,)."""
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
    """Go on as ``generate`` does with one sequence for each prompt, greedily or by sampling.

    Args:
        model: A model of transformers.
        family: Its family.
        prompts: What is kept of R prompts.
        whole: The same as they were given.
        processors: Of logits, as ``generate`` prepares them.
        criteria: For stopping, as ``generate`` prepares them.
        config: Its ``GenerationConfig``, all filled in.
        cache: An empty one; ``None`` makes one.
        streamer: Gets the prompts as given and then each step's tokens.

    Returns:
        As ``generate`` does: the prompts as given and the new tokens after them, long (R, L + T), or an output object
        with these as its ``sequences``; all else in it is about the kept tokens.

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
    """Draw a token for each row of scores (R, V), as ``generate`` does from torch's own generator: long (R,)."""
    chances = scores.softmax(-1)
    if bool(chances.isnan().any()):
        raise ValueError("the options of generate leave no token to choose from: allow some")
    return chances.multinomial(1)[:, 0]
