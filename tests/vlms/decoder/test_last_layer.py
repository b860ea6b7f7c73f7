"""The last layer run where the answer is read, against the model's own forward, which runs it everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grip_env.vlms import scoring
from grip_env.vlms.base import Encoded, Scores
from grip_env.vlms.decoder.last_layer import trunk_of
from grip_env.vlms.decoder.supported import STAGED_FAMILIES, decoder_in
from grip_env.vlms.families.known import FAMILIES
from grip_env.vlms.gated import gated_log_likelihood
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.vlms.decoder.test_staged_forward import build
from tests.vlms.families.test_known import examples, make, subsets


def whole(call: Callable[[], Any]) -> Any:
    """Return what a call gives where the whole model runs, for every column."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "trunk_of", lambda _: None)
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
    """Pictures of several sizes, answers of several lengths, budgets from nothing to everything."""
    vlm = build(kind, layers)
    vlm.model.set_attn_implementation(attention)
    encoded = vlm.encode(examples())
    assert len(set(encoded.answer_lengths.tolist())) > 1
    selection = subsets(encoded)
    assert trunk_of(vlm.model) is not None
    found = vlm.score(encoded, selection, first_token=True)
    close(found, whole(lambda: vlm.score(encoded, selection, first_token=True)))
    assert (found.log_likelihood[:, 0] - found.log_likelihood[:, -1]).abs().max() > 1e-3, "tokens must matter"


@pytest.mark.parametrize("kind", ["internvl", "llava", "llava_next"])
def test_heads_may_share_keys_in_several_groups(kind: str) -> None:
    vlm = build(kind, language={"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4})
    encoded = vlm.encode(examples())
    assert trunk_of(vlm.model) is not None
    found = vlm.score(encoded, subsets(encoded), first_token=True)
    close(found, whole(lambda: vlm.score(encoded, subsets(encoded), first_token=True)))


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

    text, block = vlm.model.config.text_config, decoder_of(vlm).layers[-1]
    columns = (len(encoded), int(encoded.lengths.max()) - 1)  # the answer's last id is in no sequence
    unread = columns[0] * (columns[1] - int(encoded.answer_lengths.max()))
    queries_and_outputs = 2 * text.hidden_size * block.self_attn.q_proj.weight.shape[0]
    spared = unread * 2 * (queries_and_outputs + 3 * text.hidden_size * text.intermediate_size)
    assert spared <= whole(count) - count() <= 1.3 * spared  # attention of these columns comes on top


def decoder_of(vlm: HuggingFaceVLM) -> Any:
    return vlm.model.model.language_model


Alteration = Callable[[HuggingFaceVLM, list[int]], None]
"""Has something put into a model note the length of every sequence that it sees."""


def hook(find: Callable[[HuggingFaceVLM], Any]) -> Alteration:
    def alter(vlm: HuggingFaceVLM, seen: list[int]) -> None:
        def note(_: Any, __: Any, output: Any) -> None:
            seen.append((output if isinstance(output, torch.Tensor) else output[0]).shape[1])

        find(vlm).register_forward_hook(note)

    return alter


def another_forward(find: Callable[[HuggingFaceVLM], Any]) -> Alteration:
    def alter(vlm: HuggingFaceVLM, seen: list[int]) -> None:
        module = find(vlm)
        own = module.forward

        def forward(*args: Any, **options: Any) -> Any:
            output = own(*args, **options)
            seen.append((output if isinstance(output, torch.Tensor) else output[0]).shape[1])
            return output

        module.forward = forward

    return alter


def pre_hook_inside_the_last_layer(vlm: HuggingFaceVLM, seen: list[int]) -> None:
    decoder_of(vlm).layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))


def wrapper_around_the_last_layer(vlm: HuggingFaceVLM, seen: list[int]) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor, **options: Any) -> Any:
            seen.append(hidden.shape[1])
            return self.inner(hidden, **options)

    layers = decoder_of(vlm).layers
    layers[-1] = Wrapper(layers[-1])


def class_of_ones_own(find: Callable[[HuggingFaceVLM], Any]) -> Alteration:
    def alter(vlm: HuggingFaceVLM, seen: list[int]) -> None:
        module = find(vlm)

        class Own(type(module)):  # type: ignore[misc]
            def forward(self, *args: Any, **options: Any) -> Any:
                seen.append((args[0] if args else options["hidden_states"]).shape[1])
                return super().forward(*args, **options)

        module.__class__ = Own

    return alter


ALTERATIONS = {
    "hook on the last layer": hook(lambda vlm: decoder_of(vlm).layers[-1]),
    "hook on the norm": hook(lambda vlm: decoder_of(vlm).norm),
    "hook on the decoder": hook(decoder_of),
    "hook on the inside": hook(lambda vlm: vlm.model.model),
    "pre-hook inside the last layer": pre_hook_inside_the_last_layer,
    "forward of the last layer": another_forward(lambda vlm: decoder_of(vlm).layers[-1]),
    "forward of the decoder": another_forward(decoder_of),
    "forward of the inside": another_forward(lambda vlm: vlm.model.model),
    "wrapper": wrapper_around_the_last_layer,
    "class of the last layer": class_of_ones_own(lambda vlm: decoder_of(vlm).layers[-1]),
    "class of its attention": class_of_ones_own(lambda vlm: decoder_of(vlm).layers[-1].self_attn),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_what_somebody_put_into_the_model_sees_every_column(name: str) -> None:
    vlm = build("llava")
    encoded = vlm.encode(examples())
    selection = subsets(encoded)
    before = vlm.score(encoded, selection, first_token=True)
    seen: list[int] = []
    ALTERATIONS[name](vlm, seen)
    assert trunk_of(vlm.model) is None
    close(vlm.score(encoded, selection, first_token=True), before)
    assert max(seen) == int(encoded.lengths.max()) - 1


@pytest.mark.parametrize("place", ["the whole", "head"])
def test_hooks_on_logits_see_those_of_the_models_own_forward(place: str) -> None:
    vlm = build("llava")
    encoded = vlm.encode(examples())
    module = vlm.model if place == "the whole" else vlm.model.lm_head
    seen: list[int] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    assert trunk_of(vlm.model) is None
    vlm.score(encoded, subsets(encoded))
    assert seen


@pytest.mark.parametrize("kind", ["forward", "full_backward"])
def test_hooks_of_gradients_fire(kind: str) -> None:
    vlm = build("llava")
    encoded = vlm.encode(examples())
    seen: list[int] = []
    getattr(decoder_of(vlm).layers[-1], f"register_{kind}_hook")(lambda *_: seen.append(1))
    tokens = encoded.tokens.clone().requires_grad_()
    vlm.log_likelihood(encoded, encoded.full_selection(), tokens).sum().backward()
    assert seen


def test_gates_run_what_somebody_put_into_the_last_layer() -> None:
    vlm = build("llava")
    encoded = vlm.encode(examples())
    ramp = torch.linspace(-1, 1, vlm.width)
    plain = gated_log_likelihood(vlm, encoded, encoded.full_selection().float())
    decoder_of(vlm).layers[-1].register_forward_hook(lambda _, __, output: output * ramp)
    gated = gated_log_likelihood(vlm, encoded, encoded.full_selection().float())
    torch.testing.assert_close(gated, vlm.log_likelihood(encoded, encoded.full_selection()), atol=1e-4, rtol=0)
    assert (gated - plain).abs().max() > 0.1


def test_compiled_layers_run_whole() -> None:
    vlm = build("llava")
    decoder_of(vlm).layers[-1].compile(backend="eager")
    assert trunk_of(vlm.model) is None


def fewer_layers_than_there_are(vlm: HuggingFaceVLM) -> None:
    vlm.model.config.text_config.num_hidden_layers -= 1


def training(vlm: HuggingFaceVLM) -> None:
    vlm.model.train()


def attention_to_what_comes_after(vlm: HuggingFaceVLM) -> None:
    vlm.model.config.text_config.is_causal = False


@pytest.mark.parametrize("change", [fewer_layers_than_there_are, training, attention_to_what_comes_after])
def test_models_that_run_otherwise_run_whole(change: Callable[[HuggingFaceVLM], None]) -> None:
    vlm = build("llava")
    change(vlm)
    assert trunk_of(vlm.model) is None


def test_layers_that_the_config_leaves_out_are_left_out() -> None:
    vlm, short = build("llava"), build("llava", layers=2)
    short.model.load_state_dict(vlm.model.state_dict(), strict=False)
    vlm.model.config.text_config.num_hidden_layers = 2
    encoded = vlm.encode(examples())
    close(*(each.score(encoded, subsets(encoded), first_token=True) for each in (vlm, short)))


def test_capturing_by_the_config_leaves_no_hooks_behind() -> None:
    vlm = build("llava")
    vlm.model.config.text_config.output_hidden_states = True
    encoded = vlm.encode(examples())
    counts = []
    for _ in range(3):
        vlm.score(encoded, encoded.full_selection())
        counts.append(sum(len(module._forward_hooks) for module in vlm.model.modules()))
    assert counts[0] == counts[-1]


def test_hooks_that_transformers_leaves_are_no_obstacle() -> None:
    vlm = build("llava")
    encoded = vlm.encode(examples())
    embeddings = vlm.model.get_input_embeddings()(encoded.input_ids[:1, :4])
    vlm.model.model.language_model(inputs_embeds=embeddings, output_hidden_states=True)
    assert decoder_of(vlm).layers[-1]._forward_hooks
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


def test_weights_that_change_are_seen() -> None:
    vlm = make("llava")
    encoded = vlm.encode(examples())

    def score() -> torch.Tensor:
        return vlm.log_likelihood(encoded, encoded.full_selection())

    before = score()
    with torch.no_grad():
        decoder_of(vlm).layers[-1].mlp.down_proj.weight.mul_(3)
        decoder_of(vlm).layers[0].mlp.down_proj.weight.mul_(3)
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
