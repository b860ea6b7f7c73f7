"""Options of ``generate`` with pruned prompts, and error messages for unsupported ones.

An option has the same precedence as in ``generate``: the value given, else the value in the given
``generation_config``, else the value in the model's own, which may come from the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation import StopStringCriteria

__all__ = ["SILENT", "Options", "check_options", "new_tokens", "option", "stopping_at_strings"]

Options = Mapping[str, Any]
"""Options of ``generate`` by name."""

DEFAULT_NEW_TOKENS = 20
"""Number of new tokens that transformers generates by default."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_count(one) for one in value)


def _is_tokens(value: Any) -> bool:
    return _is_count(value) or (_is_ids(value) and len(value) > 0)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "count": (_is_count, "a whole number of at least 0"),
    "positive": (lambda value: _is_count(value) and value > 0, "a whole number of at least 1"),
    "number": (_is_real, "a number"),
    "above": (lambda value: _is_real(value) and value > 0, "a number above 0"),
    "share": (lambda value: _is_real(value) and 0 <= value <= 1, "a number in [0, 1]"),
    "flag": (lambda value: isinstance(value, bool), "True or False"),
    "id": (_is_count, "the id of a token"),
    "ids": (_is_ids, "a list of ids of tokens"),
    "tokens": (_is_tokens, "the id of a token or a list of such"),
    "ends": (_is_tokens, "the id of a token or a list of such"),
    "pairs": (
        lambda value: (
            isinstance(value, list | tuple) and len(value) == 2 and _is_count(value[0]) and _is_real(value[1])
        ),
        "a pair of a number of tokens and a factor",
    ),
    "any": (lambda value: True, "anything"),  # transformers checks it
}

_TAKEN: dict[str, str] = {
    # length of the answer; all count the prompt as given
    "max_length": "positive",
    "max_new_tokens": "positive",
    "min_length": "count",
    "min_new_tokens": "count",
    "max_time": "above",
    "stop_strings": "any",
    # choice of a token
    "do_sample": "flag",
    "temperature": "above",
    "top_k": "count",
    "top_p": "share",
    "min_p": "share",
    "top_h": "share",
    "typical_p": "share",
    "epsilon_cutoff": "share",
    "eta_cutoff": "share",
    # changes to the logits before that; all see the prompt as given
    "repetition_penalty": "above",
    "encoder_repetition_penalty": "above",
    "no_repeat_ngram_size": "count",
    "encoder_no_repeat_ngram_size": "count",
    "bad_words_ids": "any",
    "sequence_bias": "any",
    "suppress_tokens": "ids",
    "begin_suppress_tokens": "ids",
    "forced_bos_token_id": "id",
    "forced_eos_token_id": "tokens",
    "exponential_decay_length_penalty": "pairs",
    "renormalize_logits": "flag",
    "remove_invalid_values": "flag",
    "watermarking_config": "any",
    # ways of computing, without effect on answers
    "use_cache": "flag",
    "cache_implementation": "any",
    "cache_config": "any",
    "max_cache_len": "positive",
    "prefill_chunk_size": "positive",
    "compile_config": "any",
    "disable_compile": "flag",
    # return values
    "output_attentions": "flag",
    "output_hidden_states": "flag",
    "output_scores": "flag",
    "output_logits": "flag",
    "return_dict_in_generate": "flag",
    "pad_token_id": "id",
    "bos_token_id": "id",
    "eos_token_id": "ends",
}
"""Options that work as they do without pruning, and the kind of their values."""

_UNUSED = (
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
    "low_memory",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "max_matching_ngram_size",
    "speculation_type",
    "decoder_start_token_id",
    "continuous_batching_config",
    "transformers_version",
)
"""Options that only modify those refused below, and have no effect by themselves."""

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), "pass num_beams=1"),
    "num_return_sequences": ((1,), "pass num_return_sequences=1, and call once for each sequence"),
    "num_beam_groups": ((1,), "pass num_beam_groups=1"),
    "constraints": ((), "leave them out: they need beams"),
    "force_words_ids": ((), "leave them out: they need beams"),
    "penalty_alpha": ((0, 0.0), "pass penalty_alpha=None: contrastive search is not supported"),
    "dola_layers": ((), "pass dola_layers=None"),
    "guidance_scale": ((1, 1.0), "pass guidance_scale=None: the run without a prompt has no image to prune"),
    "token_healing": ((False,), "pass token_healing=False: it changes the prompt"),
    "use_mtp": ((False,), "pass use_mtp=False: tokens are made one at a time"),
    "prompt_lookup_num_tokens": ((), "pass prompt_lookup_num_tokens=None: tokens are made one at a time"),
    "assistant_early_exit": ((), "pass assistant_early_exit=None: tokens are made one at a time"),
    "is_assistant": ((False,), "pass is_assistant=False"),
}
"""Unsupported options, with the values besides ``None`` that have no effect, and what to do instead."""

_ARGUMENTS = ("generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer")
SILENT = ("tokenizer", "synced_gpus", "trust_remote_code", "use_model_defaults", "return_dict")
"""Arguments of ``generate`` that have no effect here."""
_CACHES = ("dynamic", "static", "offloaded", "offloaded_static")
_OLD_CACHES = ("sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked")
_ADVICE = {
    "cache": "leave it out: pruned prompts start an empty one, of the kind that cache_implementation names",
    "past_key_values": "leave it out: pruned prompts start an empty one, of the kind that cache_implementation names",
    "assistant_model": "leave it out: tokens are made one at a time",
    "assistant_tokenizer": "leave it out: tokens are made one at a time",
    "custom_generate": "leave it out: pruned prompts have a decoding loop of their own",
    "negative_prompt_ids": "leave it out: guidance_scale is not supported",
    "negative_prompt_attention_mask": "leave it out: guidance_scale is not supported",
    "inputs": "give input_ids",
}


def option(name: str, saved: Any, options: Options) -> Any:
    """Return the value of an option of ``generate``.

    That is the value given, else the one in the given ``generation_config``, else the one in the model's own.
    """
    if name in options:
        return options[name]
    given = options.get("generation_config")
    value = None if given is None else getattr(given, name, None)
    return getattr(saved, name, None) if value is None else value


def check_options(saved: Any, options: Options, vocabulary: int) -> None:
    """Raise ValueError if an option is invalid, or would not work with pruned prompts as usual.

    Args:
        saved: The model's ``generation_config``.
        options: Options of ``generate``.
        vocabulary: Size of the model's vocabulary.
    """
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config must be a GenerationConfig of transformers, not {type(config).__name__}")
    known = {name: value for name, value in vars(GenerationConfig()).items() if not name.startswith("_")}
    for name, value in options.items():
        if name in (*_ARGUMENTS, *SILENT) or name in known or value is None:
            continue
        advice = _ADVICE.get(name, "leave it out, or correct its name")
        raise ValueError(f"{name} is not an option of generating from pruned prompts: {advice}")
    for name in ("logits_processor", "stopping_criteria"):
        listed = options.get(name)
        if listed is not None and not (isinstance(listed, list | tuple) and all(callable(one) for one in listed)):
            raise ValueError(f"{name} must be a list of functions, such as those of transformers")
    if options.get("prefix_allowed_tokens_fn") is not None and not callable(options["prefix_allowed_tokens_fn"]):
        raise ValueError("prefix_allowed_tokens_fn must be a function")
    if options.get("streamer") is not None and not hasattr(options["streamer"], "put"):
        raise ValueError("streamer must be one of transformers' streamers")
    for name, default in known.items():
        value = option(name, saved, options)
        if value is None or name in _UNUSED:
            continue
        if isinstance(value, torch.Tensor | np.ndarray):
            raise ValueError(f"{name} must not be {type(value).__name__}: give numbers, lists or words of Python")
        if name in _REFUSED:
            harmless, advice = _REFUSED[name]
            if not any(value is one or (type(value) is type(one) and value == one) for one in harmless):
                raise ValueError(f"{name}={value!r} is not supported: {advice}")
        elif name in _TAKEN:
            _check_kind(name, value, vocabulary)
        elif value != default:
            raise ValueError(
                f"{name}={value!r} is not known to give correct answers with pruned prompts: pass {name}={default!r}"
            )
    if option("use_cache", saved, options) is False and option("return_dict_in_generate", saved, options):
        for name in ("output_attentions", "output_hidden_states"):
            if option(name, saved, options):
                raise ValueError(f"{name} is not supported with use_cache=False: pass use_cache=True")
    if option("exponential_decay_length_penalty", saved, options) and option("eos_token_id", saved, options) is None:
        raise ValueError("exponential_decay_length_penalty needs an end token: pass eos_token_id")


def _check_kind(name: str, value: Any, vocabulary: int) -> None:
    """Raise ValueError if an option has a value of the wrong kind."""
    fits, expected = _KINDS[_TAKEN[name]]
    if not fits(value):
        raise ValueError(f"{name}={value!r} must be {expected}")
    if _TAKEN[name] in ("id", "ids", "tokens") and any(
        one >= vocabulary for one in (value if isinstance(value, list | tuple) else [value])
    ):
        raise ValueError(f"{name}={value!r} must be below {vocabulary}, how many tokens the model knows")
    if name == "cache_implementation" and value not in (*_CACHES, *_OLD_CACHES):
        raise ValueError(f"cache_implementation={value!r} is not supported: use one of {', '.join(_CACHES)}")
    if name == "cache_implementation" and "offloaded" in value and not torch.cuda.is_available():
        raise ValueError(f"cache_implementation={value!r} needs a CUDA device: leave it out")
    if name == "watermarking_config" and not (isinstance(value, dict) or hasattr(value, "construct_processor")):
        raise ValueError("watermarking_config must be a watermarking config of transformers")


def new_tokens(saved: Any, options: Options, length: int) -> int:
    """Return the maximum number of new tokens after prompts of ``length`` tokens as given.

    Raises:
        ValueError: If no new token is allowed.
    """
    most = option("max_new_tokens", saved, options)
    if most is not None:
        return int(most)
    whole = option("max_length", saved, options)
    if whole is None:
        return DEFAULT_NEW_TOKENS
    if whole <= length:
        raise ValueError(f"max_length={whole} leaves no room after a prompt of {length} tokens: pass max_new_tokens")
    return int(whole) - length


def stopping_at_strings(saved: Any, options: Options, tokenizer: Any) -> list[Any]:
    """Return a list of the criterion that stops at given strings, empty if there are none.

    Raises:
        ValueError: If they are not strings.
    """
    strings = option("stop_strings", saved, options)
    if strings is None:
        return []
    listed = [strings] if isinstance(strings, str) else strings
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(one, str) and one for one in listed):
        raise ValueError(f"stop_strings={strings!r} must be a text or a list of texts")
    return [StopStringCriteria(tokenizer=tokenizer, stop_strings=list(listed))]
