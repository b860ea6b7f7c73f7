"""How likely a frozen model finds an answer when each visual token is let through by a gate between 0 and 1.

A gate acts on attention: its logarithm is added to what the queries of every layer find at the token's key, as in the
masked attention of DynamicViT (Rao et al., NeurIPS 2021, arXiv 2106.02034). A token with gate 0 is then as good as
dropped and one with gate 1 as good as kept, so that gates of 0 and 1 give what ``vlm.score`` gives, and the gradient
tells of dropped tokens, too, what a little of them would do. Features multiplied by gates do neither: a zero vector in
the sequence is nothing that a model was trained on, and layers that normalise undo any other factor.
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
"""Added to gates before the logarithm is taken: what is left of a token with gate 0, relative to one with gate 1."""


def gated_log_likelihood(vlm: HuggingFaceVLM, encoded: Encoded, gates: torch.Tensor) -> torch.Tensor:
    """Return the mean log-likelihood of the answer's tokens under each set of gates, differentiable once in the gates.

    Every visual token stays in the sequence, at its place; a token attends to itself whatever its gate, so that the
    gradient of one at 0 is that of bringing it in. Sequences run in micro-batches of at most ``vlm.token_budget``
    tokens, forwards and, where ``gates`` needs a gradient, at once backwards: memory does not grow with B * G.

    Args:
        vlm: The frozen model.
        encoded: B examples with answers.
        gates: float (B, G, N) in [0, 1]; those of padding are not looked at.

    Returns:
        float32 (B, G), in nats per answer token.

    Raises:
        NotImplementedError: If the model is not one of those that
        :func:`~grip_env.vlms.decoder.staged_forward.decoder_of` knows.
        ValueError: If gates have another shape, examples have no answers, or the model renumbers what is kept, for
            which there is no meaning with gates between 0 and 1.

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
    if learning:  # the same value, with the gradient that is known already
        moved = gates.flatten(0, 1)
        result = result + ((moved - moved.detach()) * torch.cat(slopes)).sum(-1)
    return result.reshape(gates.shape[:2])


def check_gates(vlm: FrozenVLM) -> HuggingFaceVLM:
    """Return the model if gates can act on its attention, or raise as :func:`gated_log_likelihood` does."""
    try:
        decoder_of(vlm)
    except NotImplementedError as error:
        raise NotImplementedError(f"gates on attention need the layers of the language model: {error}") from None
    assert isinstance(vlm, HuggingFaceVLM)  # decoder_of knows no other
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
    # padding ends a row, where no token of the row looks
    bias = torch.where(itself, 0.0, let_in[:, None, None, :]).masked_fill(later, torch.finfo(hidden.dtype).min)
    rotary = decoder.rotary_emb(hidden, position_ids=position_ids)
    narrow = trunk_of(run.vlm.model) is not None  # else somebody has to see all of the last layer
    for block in decoder.layers[:-1] if narrow else decoder.layers:
        hidden = block(hidden, attention_mask=bias, position_ids=position_ids, position_embeddings=rotary)
    if narrow:
        read, targets = run._read()
        return mean_log_likelihood(logits_at(run.vlm.model, hidden, position_ids, read, bias), targets)
    run._hidden = hidden
    return mean_log_likelihood(*run._answer())
