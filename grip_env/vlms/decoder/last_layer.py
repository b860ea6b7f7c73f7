"""The last layer of a language model, run only on the columns that predict the answer.

Scoring reads just these few columns. They need the keys and values of every column in the last layer, but no other
result of the other columns. So the parts of the last layer run here on the columns that are read, after the family's
own forward pass has run all layers before it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grip_env.vlms.decoder.supported import decoder_in, decoder_name

__all__ = ["logits_at", "trunk_of"]

CAPTURING = "transformers.utils.output_capturing"
"""Module of the hooks that transformers leaves on models once attention or hidden states were asked for."""


def trunk_of(model: Any) -> Any:
    """Return a model's base model without the last layer and final norm, or ``None``.

    The result shares every weight with the model, which is not changed; its ``last_hidden_state`` is the input of the
    last layer. It exists only if :func:`logits_at` computes the same as the model: :func:`decoder_in` finds a decoder,
    the last layer is in eval mode, the classes are transformers' own, and the modules were not modified by hooks,
    compilation or another ``forward``.
    """
    decoder = decoder_in(model)
    if decoder is None or not _is_usual(decoder.config) or not _is_usual(model.config):
        return None
    if decoder.config.num_hidden_layers != len(decoder.layers) or not len(decoder.layers):
        return None
    block = decoder.layers[-1]
    if not all(_is_transformers_own(module) for module in (model, model.model, decoder, block)):
        return None
    if not _is_transformers_own(block.self_attn):
        return None
    involved = (model, model.model, decoder, *block.modules(), decoder.norm, model.get_output_embeddings())
    if block.training or any(_is_altered(module) for module in involved):
        return None
    shorter = _twin(decoder, layers=decoder.layers[:-1], norm=torch.nn.Identity())
    return _twin(model.model, **{decoder_name(model.model): shorter})


def logits_at(
    model: Any,
    hidden: torch.Tensor,
    position_ids: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the last layer, final norm and head on chosen columns: float32 (R, T, vocabulary).

    Args:
        model: A model for which :func:`trunk_of` returns a trunk.
        hidden: Input of the last layer, (R, L, D).
        position_ids: Position ids, long (R, L).
        columns: Columns to read, long (R, T).
        bias: Term added to the attention logits between columns, (R or 1, 1, L, L); by default a column sees itself
            and those before it.
    """
    decoder = decoder_in(model)
    block = decoder.layers[-1]
    attention = block.self_attn

    def at(values: torch.Tensor) -> torch.Tensor:
        return values.gather(1, columns[..., None].expand(-1, -1, values.shape[-1]))

    def heads(values: torch.Tensor) -> torch.Tensor:
        return values.view(*values.shape[:2], -1, attention.head_dim).transpose(1, 2)

    normed = block.input_layernorm(hidden)
    cos, sin = (part.expand(len(hidden), -1, -1) for part in decoder.rotary_emb(hidden, position_ids=position_ids))
    query = _rotated(heads(attention.q_proj(at(normed))), at(cos), at(sin))  # (R, heads, T, head_dim)
    key, value = _rotated(heads(attention.k_proj(normed)), cos, sin), heads(attention.v_proj(normed))
    if bias is None:
        seen = torch.arange(hidden.shape[1], device=hidden.device) <= columns[..., None]  # (R, T, L)
    else:
        seen = at(bias[:, 0].expand(len(hidden), -1, -1))
    # fused even if the other layers are not, which is the same up to rounding
    found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        attention, query, key, value, seen[:, None], dropout=0.0, scaling=attention.scaling
    )
    states = at(hidden) + attention.o_proj(found.flatten(2))
    states = states + block.mlp(block.post_attention_layernorm(states))
    logits: torch.Tensor = model.get_output_embeddings()(decoder.norm(states))
    return logits.float()


def _rotated(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys (R, heads, L, head_dim) by the angles of their positions.

    Cosines and sines of the angles are (R, L, head_dim).
    """
    first, second = values.chunk(2, -1)
    return values * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def _twin(module: torch.nn.Module, **parts: torch.nn.Module) -> torch.nn.Module:
    """Return a shallow copy of ``module`` with the given parts replaced."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **parts}
    return twin


def _is_usual(config: Any) -> bool:
    """Return whether a config keeps attention causal and asks for no intermediate outputs."""
    captures = any(getattr(config, f"output_{kind}", False) for kind in ("attentions", "hidden_states"))
    return getattr(config, "is_causal", True) is not False and not captures


def _is_transformers_own(module: torch.nn.Module) -> bool:
    """Return whether a module's class and its ``forward`` belong to a model of transformers."""
    own = "transformers.models."
    return type(module).__module__.startswith(own) and type(module).forward.__module__.startswith(own)


def _is_altered(module: torch.nn.Module) -> bool:
    """Return whether a module does anything other than run the ``forward`` of its class."""
    hooks = (
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *module._backward_pre_hooks.values(),
        *module._backward_hooks.values(),
    )
    return (
        "forward" in vars(module)
        or module._compiled_call_impl is not None
        or any(getattr(hook, "__module__", "") != CAPTURING for hook in hooks)
    )
