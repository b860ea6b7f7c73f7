"""The last layer run where the answer is read, against the model's own forward, which runs it everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grip_env.vlms import huggingface
from grip_env.vlms.base import Encoded, Scores
from grip_env.vlms.families import FAMILIES
from grip_env.vlms.huggingface import HuggingFaceVLM
from grip_env.vlms.last_layer import STAGED_FAMILIES, decoder_in, trunk_of
from tests.vlms.test_families import examples, make, subsets
from tests.vlms.test_staged import build


def whole(call: Callable[[], Any]) -> Any:
    """Return what a call gives where the whole model runs, for every column."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "trunk_of", lambda _: None)
        return call()


def close(found: Scores, expected: Scores) -> None:
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, atol=1e-5, rtol=0)
    assert found.correct.equal(expected.correct)
    assert found.first_token is not None
    assert expected.first_token is not None
    torch.testing.assert_close(found.first_token, expected.first_token, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", sorted(STAGED_FAMILIES))
def test_scores_are_those_of_the_whole_model(kind: str, attention: str, layers: int) -> None:
    """Pictures of several sizes, answers of several lengths, budgets from nothing to everything, heads in groups."""
    vlm = build(kind, layers)
    vlm.model.set_attn_implementation(attention)
    encoded = vlm.encode(examples())
    assert len(set(encoded.answer_lengths.tolist())) > 1
    selection = subsets(encoded)
    assert trunk_of(vlm.model) is not None
    found = vlm.score(encoded, selection, first_token=True)
    close(found, whole(lambda: vlm.score(encoded, selection, first_token=True)))
    assert (found.log_likelihood[:, 0] - found.log_likelihood[:, -1]).abs().max() > 1e-3, "tokens must matter"


def test_positions_may_be_renumbered() -> None:
    vlm = build("llava", position_policy="reindex")
    encoded = vlm.encode(examples())
    selection = subsets(encoded)
    found = vlm.score(encoded, selection, first_token=True)
    close(found, whole(lambda: vlm.score(encoded, selection, first_token=True)))
    original = build("llava").score(encoded, selection, first_token=True)
    assert (found.log_likelihood - original.log_likelihood).abs().max() > 1e-4, "positions must matter"


def test_gradients_are_those_of_the_whole_model() -> None:
    vlm = build("llava")
    encoded = vlm.encode(examples())
    selection = subsets(encoded)

    def slope() -> torch.Tensor:
        tokens = encoded.tokens.clone().requires_grad_()
        vlm.log_likelihood(encoded, selection, tokens).sum().backward()
        assert tokens.grad is not None
        return tokens.grad

    found = slope()
    torch.testing.assert_close(found, whole(slope), atol=1e-5, rtol=1e-4)
    assert found.abs().max() > 1e-3


def test_the_columns_that_are_not_read_are_spared() -> None:
    vlm = build("llava")
    encoded = vlm.encode(examples())
    selection = encoded.full_selection()

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            vlm.score(encoded, selection)
        return counter.get_total_flops()

    text, block = vlm.model.config.text_config, vlm.model.model.language_model.layers[-1]
    columns = (len(encoded), int(encoded.lengths.max()) - 1)  # the answer's last id is in no sequence
    unread = columns[0] * (columns[1] - int(encoded.answer_lengths.max()))
    queries_and_outputs = 2 * text.hidden_size * block.self_attn.q_proj.weight.shape[0]
    spared = unread * 2 * (queries_and_outputs + 3 * text.hidden_size * text.intermediate_size)
    assert spared <= whole(count) - count() <= 1.3 * spared  # attention of these columns comes on top


def hook_on_the_last_layer(vlm: HuggingFaceVLM, seen: list[int]) -> None:
    layer = vlm.model.model.language_model.layers[-1]
    layer.register_forward_hook(lambda _, __, output: seen.append(output.shape[1]))


def pre_hook_inside_the_last_layer(vlm: HuggingFaceVLM, seen: list[int]) -> None:
    layer = vlm.model.model.language_model.layers[-1]
    layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))


def another_forward(vlm: HuggingFaceVLM, seen: list[int]) -> None:
    decoder = vlm.model.model.language_model
    own = decoder.forward

    def forward(*args: Any, **options: Any) -> Any:
        output = own(*args, **options)
        seen.append(output.last_hidden_state.shape[1])
        return output

    decoder.forward = forward


@pytest.mark.parametrize("alter", [hook_on_the_last_layer, pre_hook_inside_the_last_layer, another_forward])
def test_what_somebody_put_into_the_model_sees_every_column(alter: Callable[[HuggingFaceVLM, list[int]], None]) -> None:
    vlm = build("llava")
    encoded = vlm.encode(examples())
    selection = subsets(encoded)
    before = vlm.score(encoded, selection, first_token=True)
    seen: list[int] = []
    alter(vlm, seen)
    assert trunk_of(vlm.model) is None
    close(vlm.score(encoded, selection, first_token=True), before)
    assert max(seen) == int(encoded.lengths.max()) - 1


def test_compiled_layers_run_whole() -> None:
    vlm = build("llava")
    vlm.model.model.language_model.layers[-1].compile(backend="eager")
    assert trunk_of(vlm.model) is None


def test_hooks_that_transformers_leaves_are_no_obstacle() -> None:
    vlm = build("llava")
    encoded = vlm.encode(examples())
    embeddings = vlm.model.get_input_embeddings()(encoded.input_ids[:1, :4])
    vlm.model.model.language_model(inputs_embeds=embeddings, output_hidden_states=True)
    assert vlm.model.model.language_model.layers[-1]._forward_hooks
    assert trunk_of(vlm.model) is not None


def test_the_model_itself_stays_as_it_is(random_vlm: HuggingFaceVLM) -> None:
    model = random_vlm.model
    decoder = model.model.language_model
    before = (list(decoder.layers), decoder.norm, model.model.language_model)
    trunk = trunk_of(model)
    assert (list(decoder.layers), decoder.norm, model.model.language_model) == before
    shared = {id(weight) for weight in model.parameters()}
    assert all(id(weight) in shared for weight in trunk.parameters())
    assert len(trunk.language_model.layers) == len(decoder.layers) - 1
    assert trunk.language_model.norm is not decoder.norm


def test_weights_that_change_are_seen(random_vlm: HuggingFaceVLM) -> None:
    vlm = make("llava")
    encoded = vlm.encode(examples())

    def score() -> torch.Tensor:
        return vlm.log_likelihood(encoded, encoded.full_selection())

    before = score()
    with torch.no_grad():
        vlm.model.model.language_model.layers[-1].mlp.down_proj.weight.mul_(3)
        vlm.model.model.language_model.layers[0].mlp.down_proj.weight.mul_(3)
    assert (score() - before).abs().max() > 1e-3
    torch.testing.assert_close(score(), whole(score), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - set(STAGED_FAMILIES)))
def test_other_families_run_whole(kind: str) -> None:
    model = make(kind).model
    assert decoder_in(model) is None
    assert trunk_of(model) is None


def test_answers_of_one_id_have_none_in_the_sequence(random_vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    """What scores are read from is then the prompt alone: it stays the same whatever the answer is."""
    other = encoded.input_ids.clone()
    last = (torch.arange(len(encoded)), encoded.lengths - 1)
    other[last] = other[last].flip(0)
    assert encoded.answer_lengths.eq(1).all()
    swapped = Encoded(**{**vars(encoded), "input_ids": other})
    found = [random_vlm.score(each, each.full_selection(), first_token=True).first_token for each in (encoded, swapped)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].equal(found[1])


@pytest.fixture
def encoded(random_vlm: HuggingFaceVLM, scene_examples: list[Any]) -> Encoded:
    return random_vlm.encode(scene_examples)
