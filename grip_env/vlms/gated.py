"""Answer log-likelihood of a frozen model with a gate in [0, 1] for each visual token.

A gate acts on attention: in every layer, its logarithm is added to the attention logits at the token's key, as in the
masked attention of DynamicViT (Rao et al., NeurIPS 2021, arXiv 2106.02034). A token with gate 0 is then practically
dropped and one with gate 1 kept. So gates of 0 and 1 give the same as ``vlm.score``, and the gradient shows for dropped
tokens, too, what a small share of them would change. Multiplying features by gates has neither property: models were
never trained with a zero vector in the sequence, and normalisation layers cancel any other factor.
"""

from __future__ import annotations

import torch

from grip_env.vlms.base import Encoded, FrozenVLM
from grip_env.vlms.decoder.last_layer import logits_at, trunk_of
from grip_env.vlms.decoder.staged_forward import StagedForward, decoder_of
from grip_env.vlms.huggingface import HuggingFaceVLM
from grip_env.vlms.likelihood import mean_log_likelihood

__all__ = ["check_gates", "gated_log_likelihood"]

SMALLEST = 1e-8
"""Constant added to gates before the logarithm: the remaining weight of gate 0 relative to gate 1."""


def gated_log_likelihood(vlm: HuggingFaceVLM, encoded: Encoded, gates: torch.Tensor) -> torch.Tensor:
    """Return the mean log-likelihood of the answer's tokens under each set of gates.

    The result can be differentiated once with respect to the gates. Every visual token keeps its place in the sequence.
    A token attends to itself whatever its gate, so the gradient at gate 0 is that of adding the token. Sequences run in
    micro-batches of at most ``vlm.token_budget`` tokens. If ``gates`` requires a gradient, each micro-batch runs
    backwards right after its forward pass, so memory does not grow with B * G.

    Args:
        vlm: The frozen model.
        encoded: B examples with answers.
        gates: float (B, G, N) in [0, 1]; the gates of padding are ignored.

    Returns:
        float32 (B, G), in nats per answer token.

    Raises:
        NotImplementedError: If :func:`~grip_env.vlms.decoder.staged_forward.decoder_of` does not support the model.
        ValueError: If gates have the wrong shape, examples have no answers, or the model renumbers the kept tokens,
            which is undefined for gates between 0 and 1.

    >>> from grip_env import SceneTask, load_vlm
    >>> vlm = load_vlm("tiny")
    >>> encoded = vlm.encode([SceneTask().example("test", index) for index in range(2)])
    >>> gates = torch.full((2, 1, 144), 0.5, requires_grad=True)
    >>> gated_log_likelihood(vlm, encoded, gates).sum().backward()
    >>> gates.grad.shape
    torch.Size([2, 1, 144])
    """
    batch, tokens = encoded.token_mask.shape
    if not gates.is_floating_point() or gates.dim() != 3 or gates.shape[::2] != (batch, tokens):
        raise ValueError(
            f"gates must be floats of shape ({batch}, G, {tokens}); got {gates.dtype} of shape {tuple(gates.shape)}: "
            "give one number from 0 to 1 for each visual token, G times for each example"
        )
    check_gates(vlm)
    if not bool(encoded.answer_lengths.all()):
        raise ValueError("there are no answers to score: encode the examples with their answers")
    run = StagedForward(vlm, encoded)
    flat = gates.detach().flatten(0, 1)  # (B * G, N)
    example = torch.arange(batch, device=flat.device).repeat_interleave(gates.shape[1])
    learning = gates.requires_grad and torch.is_grad_enabled()
    values: list[torch.Tensor] = []
    slopes: list[torch.Tensor] = []
    most = max(1, vlm.token_budget // encoded.input_ids.shape[1])
    for rows in torch.arange(len(flat), device=flat.device).split(most):
        part = flat[rows].requires_grad_(learning)
        with torch.set_grad_enabled(learning):
            value = _likelihood(run[example[rows]], part)
        values.append(value.detach())
        if learning:
            slopes.extend(torch.autograd.grad(value.sum(), part))  # a row's value depends on its own gates only
    result = torch.cat(values)
    if learning:  # the same value, with the gradient computed above
        moved = gates.flatten(0, 1)
        result = result + ((moved - moved.detach()) * torch.cat(slopes)).sum(-1)
    return result.reshape(gates.shape[:2])


def check_gates(vlm: FrozenVLM) -> HuggingFaceVLM:
    """Return the model if gates can act on its attention.

    Raises:
        NotImplementedError: As in :func:`gated_log_likelihood`.
        ValueError: If the model renumbers the kept tokens.
    """
    try:
        decoder_of(vlm)
    except NotImplementedError as error:
        raise NotImplementedError(f"gates on attention need the layers of the language model: {error}") from None
    assert isinstance(vlm, HuggingFaceVLM)  # decoder_of accepts no other
    if vlm.position_policy != "original":
        raise ValueError(
            f"gates between 0 and 1 leave every token at its place, and this model has position_policy "
            f"{vlm.position_policy!r}, which renumbers what is kept: load it with position_policy='original'"
        )
    return vlm


def _likelihood(run: StagedForward, gates: torch.Tensor) -> torch.Tensor:
    """Run all layers under the gates (R, N) and score the answers, float32 (R,)."""
    decoder = decoder_of(run.vlm)
    hidden, position_ids, token = run._hidden, run._position_ids, run._token
    length = hidden.shape[1]
    let_in = (gates + SMALLEST).log().gather(1, token.clamp_min(0))  # (R, L)
    let_in = torch.where(token >= 0, let_in, 0.0).to(hidden.dtype)
    itself = torch.eye(length, dtype=torch.bool, device=hidden.device)
    later = torch.ones_like(itself).triu(1)
    # padding comes last in a row, so causal attention never reaches it
    bias = torch.where(itself, 0.0, let_in[:, None, None, :]).masked_fill(later, torch.finfo(hidden.dtype).min)
    rotary = decoder.rotary_emb(hidden, position_ids=position_ids)
    narrow = trunk_of(run.vlm.model) is not None  # else the last layer has to run on all columns
    for block in decoder.layers[:-1] if narrow else decoder.layers:
        hidden = block(hidden, attention_mask=bias, position_ids=position_ids, position_embeddings=rotary)
    if narrow:
        read, targets = run._read()
        return mean_log_likelihood(logits_at(run.vlm.model, hidden, position_ids, read, bias), targets)
    run._hidden = hidden
    return mean_log_likelihood(*run._answer())
