"""The staged pass against the model's own forward on the full sequence, with what was dropped hidden layer by layer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from grip_env.tasks.base import Example
from grip_env.vlms.base import Encoded
from grip_env.vlms.decoder.staged_forward import StagedForward, decoder_of
from grip_env.vlms.decoder.supported import STAGED_FAMILIES
from grip_env.vlms.families.known import FAMILIES
from grip_env.vlms.flops import flops_saved, prefill_flops, staged_flops
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fakes import FakeTask, FakeVLM
from tests.vlms import tiny_models
from tests.vlms.families.test_known import answer_ids, examples, process
from tests.vlms.plain import run_prompt


def build(kind: str, layers: int = 3, language: Mapping[str, Any] | None = None, **options: Any) -> HuggingFaceVLM:
    """A tiny model of a family, with a deeper language model, so that there are inner boundaries."""
    config = {"num_hidden_layers": layers, **(language or {})}
    with pytest.MonkeyPatch.context() as patch:
        shared = tiny_models._language
        patch.setattr(tiny_models, "_language", lambda *args, **more: shared(*args, **{**more, **config}))
        return HuggingFaceVLM(*tiny_models.build(kind), kind, **options)


@pytest.fixture(scope="module", params=STAGED_FAMILIES)
def vlm(request: pytest.FixtureRequest) -> HuggingFaceVLM:
    return build(str(request.param))


@pytest.fixture(scope="module")
def llava() -> HuggingFaceVLM:
    return build("llava")


def luck(encoded: Encoded, share: float, seed: int) -> torch.Tensor:
    """A random selection of about a share of the tokens, bool (B, N); rows differ in how many they keep."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(encoded.token_mask.shape, generator=generator) < share) & encoded.token_mask


@dataclasses.dataclass
class Reference:
    logits: torch.Tensor
    """Of the columns that predict the answer, (T, V)."""
    hidden: list[torch.Tensor]
    """What enters each layer at the visual tokens, (N, D)."""
    attention: list[torch.Tensor]
    """What the last token of the prompt gives each visual token in each layer, (N,); empty unless eager."""

    def log_likelihood(self, answer: list[int]) -> float:
        chosen = self.logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
        return float(chosen.mean())

    def correct(self, answer: list[int]) -> bool:
        return self.logits.argmax(-1).tolist() == answer


def full_run(
    vlm: HuggingFaceVLM,
    encoded: Encoded,
    row: int,
    drops: Mapping[int, torch.Tensor],
    reindex: bool = False,
    attend: bool = False,
) -> Reference:
    """Run processor and model on the whole sequence of an example; nothing of the staged pass is used.

    Args:
        vlm: The model.
        encoded: Tells the ids of the answer.
        row: Which example.
        drops: From which layer on which of the visual tokens (N,) are hidden from attention: all not in these masks.
        reindex: Positions of a layer count what is not hidden in it.
        attend: Whether to return attention, for which the model must be eager.
    """
    answer = answer_ids(encoded, row)
    inputs = process(vlm, encoded.examples[row])
    inputs["input_ids"] = ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.zeros(1, len(answer), dtype=torch.long)], 1)
    inputs["attention_mask"] = torch.ones_like(ids)
    visual = ids[0] == vlm.model.config.image_token_id
    names = dict(vlm.model.named_modules())
    (home,) = [name for name in names if name.endswith(("text_model", "language_model"))]
    decoder: Any = names[home]
    length, shown, hidden = ids.shape[1], torch.ones(ids.shape[1], dtype=torch.bool), []
    handles = []

    def enter(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            nonlocal shown
            hidden.append(args[0][0, visual].clone())
            if layer in drops:
                shown = shown.clone()
                shown[visual] &= drops[layer][: int(visual.sum())]
            seen = torch.ones(length, length).tril().bool() & shown
            mask = torch.full((1, 1, length, length), -1e9).masked_fill(seen, 0)
            places = (shown.long().cumsum(0) - 1).clamp_min(0) if reindex else torch.arange(length)
            rotary = decoder.rotary_emb(args[0], position_ids=places[None])
            return args, {**kwargs, "attention_mask": mask.to(args[0].dtype), "position_embeddings": rotary}

        return hook

    for layer, block in enumerate(decoder.layers):
        handles.append(block.register_forward_pre_hook(enter(layer), with_kwargs=True))
    try:
        with torch.no_grad():
            output = vlm.model(**inputs, use_cache=False, output_attentions=attend)
    finally:
        for handle in handles:
            handle.remove()
    last = length - len(answer) - 1
    attention = [one[0].mean(0)[last, visual] for one in output.attentions] if attend else []
    return Reference(output.logits[0, last : length - 1], hidden, attention)


def staged(vlm: HuggingFaceVLM, encoded: Encoded, drops: Mapping[int, torch.Tensor]) -> StagedForward:
    run = StagedForward(vlm, encoded)
    for layer, keep in drops.items():
        run.advance(layer)
        run.drop(keep)
    return run


def assert_close(found: Any, expected: Any, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# -- the oracle ------------------------------------------------------------------------------------------


def test_dropping_nothing_equals_the_dense_model(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples())
    expected = vlm.score(encoded, encoded.full_selection())
    for run in (StagedForward(vlm, encoded), staged(vlm, encoded, {1: encoded.token_mask, 2: encoded.token_mask})):
        found = run.finish()
        assert_close(found.log_likelihood, expected.log_likelihood)
        assert found.correct.equal(expected.correct)
        assert found.log_likelihood.shape == (4, 1)


def test_dropping_at_the_first_layer_only_equals_scoring_the_selection(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples())
    for share in (0.0, 0.1, 0.6):
        keep = luck(encoded, share, 1)
        expected = vlm.score(encoded, keep[:, None])
        for run in (StagedForward(vlm, encoded, keep), staged(vlm, encoded, {0: keep})):
            found = run.finish()
            assert_close(found.log_likelihood, expected.log_likelihood)
            assert found.correct.equal(expected.correct)


@pytest.mark.parametrize("layers", [(1,), (2,), (0, 2), (0, 1, 2)])
def test_dropping_at_inner_layers_equals_hiding_from_there_on(vlm: HuggingFaceVLM, layers: tuple[int, ...]) -> None:
    encoded = vlm.encode(examples())
    drops = {layer: luck(encoded, 0.6, layer) for layer in layers}
    found = staged(vlm, encoded, drops).finish()
    dense = vlm.score(encoded, encoded.full_selection()).log_likelihood[:, 0]
    for row in range(4):
        reference = full_run(vlm, encoded, row, {layer: keep[row] for layer, keep in drops.items()})
        answer = answer_ids(encoded, row)
        assert float(found.log_likelihood[row, 0]) == pytest.approx(reference.log_likelihood(answer), abs=1e-4)
        assert bool(found.correct[row, 0]) == reference.correct(answer)
    assert (found.log_likelihood[:, 0] - dense).abs().max() > 0.01, "drops must matter, or this shows nothing"


def test_hidden_states_are_those_of_the_full_sequence_and_zero_where_dropped(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples())
    first, second = luck(encoded, 0.7, 3), luck(encoded, 0.7, 4)
    run = StagedForward(vlm, encoded)
    assert run.hidden().equal(encoded.tokens)
    assert run.alive.equal(encoded.token_mask)
    for layer, keep, alive in ((0, first, first), (1, second, first & second), (2, first, first & second)):
        run.advance(layer)
        before = run.hidden()
        run.drop(keep)
        assert run.alive.equal(alive), "what was dropped must not come back"
        assert run.hidden().equal(before.masked_fill(~alive[..., None], 0))
        for row in range(4):
            reference = full_run(vlm, encoded, row, {0: first[row], 1: (first & second)[row]})
            real = len(reference.hidden[layer])
            expected = reference.hidden[layer].masked_fill(~alive[row, :real, None], 0)
            assert_close(run.hidden()[row, :real], expected)
            assert (run.hidden()[row, real:] == 0).all()


def test_attention_is_what_the_next_layer_computes(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples())
    first, second = luck(encoded, 0.7, 5), luck(encoded, 0.7, 6)
    drops = {0: first, 2: first & second}
    run = StagedForward(vlm, encoded)
    found = []
    for layer in range(3):
        run.advance(layer)
        run.drop(drops.get(layer, encoded.token_mask))
        found.append(run.attention())
    before = vlm.model.config.get_text_config()._attn_implementation
    vlm.model.set_attn_implementation("eager")
    try:
        for row in range(4):
            reference = full_run(vlm, encoded, row, {layer: keep[row] for layer, keep in drops.items()}, attend=True)
            for layer in range(3):
                expected = reference.attention[layer]
                assert_close(found[layer][row, : len(expected)], expected, 1e-5)
    finally:
        vlm.model.set_attn_implementation(before)
    assert (found[2][~(first & second)] == 0).all()
    assert ((found[2] > 0) == (first & second)).all()


def test_reindexed_positions_count_what_is_left_at_each_layer() -> None:
    vlm = build("llava", position_policy="reindex")
    encoded = vlm.encode(examples(2))
    drops = {0: luck(encoded, 0.7, 7), 2: luck(encoded, 0.5, 8)}
    found = staged(vlm, encoded, drops).finish().log_likelihood
    for row in range(2):
        answer = answer_ids(encoded, row)
        own = {layer: keep[row] for layer, keep in drops.items()}
        renumbered = full_run(vlm, encoded, row, own, reindex=True).log_likelihood(answer)
        assert float(found[row, 0]) == pytest.approx(renumbered, abs=1e-4)
        assert abs(full_run(vlm, encoded, row, own).log_likelihood(answer) - renumbered) > 1e-3
    expected = vlm.score(encoded, drops[0][:, None]).log_likelihood
    assert_close(StagedForward(vlm, encoded, drops[0]).finish().log_likelihood, expected)


def test_eager_and_fused_attention_agree(random_vlm: HuggingFaceVLM, scene_examples: list[Example]) -> None:
    encoded = random_vlm.encode(scene_examples)
    drops = {layer: luck(encoded, 0.5, layer) for layer in (1, 3)}
    assert random_vlm.model.config.get_text_config()._attn_implementation == "eager"
    eager = staged(random_vlm, encoded, drops).finish().log_likelihood
    random_vlm.model.set_attn_implementation("sdpa")
    try:
        fused = staged(random_vlm, encoded, drops).finish().log_likelihood
    finally:
        random_vlm.model.set_attn_implementation("eager")
    assert_close(fused, eager)


def test_half_precision_agrees_with_scoring(llava: HuggingFaceVLM) -> None:
    vlm = HuggingFaceVLM(tiny_models.build("llava")[0].to(torch.bfloat16), llava.processor)
    encoded = vlm.encode(examples())
    keep = luck(encoded, 0.5, 9)
    run = StagedForward(vlm, encoded, keep)
    assert run.hidden().dtype == torch.bfloat16
    assert run.attention().dtype == torch.float32
    found = run.finish().log_likelihood
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, vlm.score(encoded, keep[:, None]).log_likelihood, atol=0.05, rtol=0.02)


# -- what can be looked at -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_answers", [True, False])
def test_looks_are_what_the_model_itself_has_at_each_layer(vlm: HuggingFaceVLM, with_answers: bool) -> None:
    encoded = vlm.encode(examples())
    references = [run_prompt(vlm, example) for example in encoded.examples]
    run = StagedForward(vlm, encoded, with_answers=with_answers)
    assert run.words.sum(1).tolist() == [len(reference.words) for reference in references]
    assert len(set(run.words.sum(1).tolist())) > 1, "rows must differ, or padding is not tested"
    raters = (torch.rand(run.words.shape, generator=torch.Generator().manual_seed(17)) < 0.4) & run.words
    raters[:, 0] = True
    for layer in range(3):
        run.advance(layer)
        seen = run.attention(raters)
        for row, reference in enumerate(references):
            for part, columns in (("tokens", reference.visual), ("words", reference.words)):
                count = len(columns)
                hidden, keys = run.hidden(part)[row], run.keys(part)[row]
                assert_close(hidden[:count], reference.hidden[layer][columns])
                assert_close(keys[:count], reference.keys[layer][:, columns].transpose(0, 1).flatten(1))
                assert (hidden[count:] == 0).all()
                assert (keys[count:] == 0).all()
            asked = [reference.words[word] for word in raters[row].nonzero().flatten().tolist()]
            expected = reference.attention[layer][:, asked][:, :, reference.visual].mean((0, 1))
            assert_close(seen[row, : len(expected)], expected, 1e-5)
            assert (seen[row, len(expected) :] == 0).all()
    run.advance(3)
    for row, reference in enumerate(references):  # the model returns the last states behind the norm
        for part, columns in (("tokens", reference.visual), ("words", reference.words)):
            normed = run.hidden(part, normed=True)[row]
            assert_close(normed[: len(columns)], reference.hidden[3][columns])
            assert (normed[len(columns) :] == 0).all()


def test_looks_follow_what_is_dropped_and_words_stay(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples())
    keep = luck(encoded, 0.5, 18)
    keep[1] = False  # nothing of this picture is left
    run = staged(vlm, encoded, {1: keep})
    before = StagedForward(vlm, encoded)
    before.advance(1)
    assert run.words.equal(before.words)
    assert run.hidden("words").equal(before.hidden("words"))
    assert_close(run.keys("words"), before.keys("words"))
    for look, dense in ((run.keys(), before.keys()), (run.hidden(normed=True), before.hidden(normed=True))):
        assert_close(look, dense.masked_fill(~keep[..., None], 0))
    last = torch.zeros_like(run.words)
    last[torch.arange(4), run.words.sum(1) - 1] = True
    assert_close(run.attention(last), run.attention(), 1e-6)
    first = torch.zeros_like(last)
    first[:, 0] = True
    assert_close(run.attention(first | last), (run.attention(first) + run.attention(last)) / 2, 1e-6)
    assert (run.attention(first) - run.attention(last)).abs().max() > 1e-3
    branch = run[[2, 0]]
    assert_close(branch.attention(first[[2, 0]]), run.attention(first)[[2, 0]], 1e-6)


def test_without_answers_nothing_depends_on_them_to_the_last_bit(vlm: HuggingFaceVLM) -> None:
    batch = examples()
    other = [dataclasses.replace(example, answer="three blue circles, no red") for example in batch]
    runs = [StagedForward(vlm, vlm.encode(each), with_answers=False) for each in (batch, other)]
    for run in runs:
        run.advance(1)
        run.drop(luck(vlm.encode(batch), 0.5, 19))
        run.advance(2)
    for look in (StagedForward.hidden, StagedForward.keys, StagedForward.attention, StagedForward.lengths):
        assert look(runs[0]).equal(look(runs[1])), look.__name__
    with pytest.raises(ValueError, match="no answers to score"):
        runs[0].finish()


# -- what may not change anything ------------------------------------------------------------------------


def test_batches_padding_and_micro_batches_change_nothing(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples())
    drops = {0: luck(encoded, 0.8, 10), 1: luck(encoded, 0.4, 11)}
    drops[1][2] = False  # a row with nothing left among rows with much
    together = staged(vlm, encoded, drops)
    hidden, attention = together.hidden(), together.attention()
    expected = together.finish().log_likelihood
    few = HuggingFaceVLM(vlm.model, vlm.processor, token_budget=100)
    split = staged(few, encoded, drops)
    assert_close(split.attention(), attention)
    assert_close(split.finish().log_likelihood, expected)
    for row, example in enumerate(encoded.examples):
        alone = vlm.encode([example])
        count = alone.token_mask.shape[1]
        run = staged(vlm, alone, {layer: keep[row : row + 1, :count] for layer, keep in drops.items()})
        assert_close(run.hidden()[0], hidden[row, :count])
        assert_close(run.attention()[0], attention[row, :count])
        assert_close(run.finish().log_likelihood[0], expected[row])


def test_visual_tokens_know_nothing_of_the_answer(vlm: HuggingFaceVLM) -> None:
    batch = examples()
    other = [dataclasses.replace(example, answer="three blue circles, no red") for example in batch]
    encoded, changed = vlm.encode(batch), vlm.encode(other)
    drops = {0: luck(encoded, 0.8, 12), 1: luck(encoded, 0.6, 13)}
    found, again = staged(vlm, encoded, drops), staged(vlm, changed, drops)
    for layer in (1, 2):
        found.advance(layer)
        again.advance(layer)
        assert_close(again.hidden(), found.hidden(), 1e-5)
        assert_close(again.attention(), found.attention(), 1e-5)
    fewer = staged(vlm, encoded, {0: luck(encoded, 0.5, 12), 1: drops[1]})  # this is what they do know of
    both = fewer.alive & found.alive
    assert (fewer.hidden() - staged(vlm, encoded, drops).hidden())[both].abs().max() > 1e-3
    assert (again.finish().log_likelihood - found.finish().log_likelihood).abs().max() > 1e-3


def test_dropped_tokens_really_leave_the_batch(llava: HuggingFaceVLM) -> None:
    encoded = llava.encode(examples())
    shapes: list[tuple[int, ...]] = []
    blocks = decoder_of(llava).layers
    handles = [
        block.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
        for block in blocks
    ]
    try:
        run = StagedForward(llava, encoded)
        run.advance(1)
        run.drop(encoded.token_mask & (torch.arange(36) < 5))
        run.finish()
    finally:
        for handle in handles:
            handle.remove()
    dense, pruned = int(encoded.lengths.max()), int(encoded.lengths.max()) - 31
    assert shapes == [(4, dense), (4, pruned), (4, pruned)]
    assert run.lengths().tolist() == (encoded.lengths - 31).tolist()


def test_a_pass_branches_without_running_its_layers_again(llava: HuggingFaceVLM) -> None:
    encoded = llava.encode(examples())
    first, second, third = (luck(encoded, 0.6, seed) for seed in (14, 15, 16))
    trunk = staged(llava, encoded, {0: first})
    trunk.advance(2)
    rows = [1, 1, 3]
    branch = trunk[rows]
    keep = torch.stack([second[1], third[1], third[3]])
    branch.drop(keep)
    found = branch.finish().log_likelihood
    assert (trunk.layer, len(trunk), trunk.alive.tolist()) == (2, 4, first.tolist())
    expected = staged(llava, encoded[rows], {0: first[rows], 2: keep}).finish().log_likelihood
    assert_close(found, expected)
    assert_close(trunk[1:3].finish().log_likelihood, trunk.finish().log_likelihood[1:3])


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - set(STAGED_FAMILIES)))
def test_other_families_are_refused_by_name_with_the_list(kind: str) -> None:
    vlm = HuggingFaceVLM(*tiny_models.build(kind), kind)
    with pytest.raises(NotImplementedError, match=f"llava_onevision, smolvlm .* is of family '{kind}'"):
        decoder_of(vlm)


def test_other_models_language_models_and_attention_are_refused(llava: HuggingFaceVLM) -> None:
    fake = FakeVLM()
    with pytest.raises(NotImplementedError, match=r"idefics3, internvl.*'fake' is a FakeVLM"):
        StagedForward(fake, fake.encode([FakeTask().example("train", 0)]))  # type: ignore[arg-type]
    vlm = build("llava")
    vlm.model.config.text_config.model_type = "gemma2"
    with pytest.raises(NotImplementedError, match=r"llama, mistral, qwen2; 'llava' is of family 'llava' with .*gemma2"):
        decoder_of(vlm)
    vlm = build("llava")
    vlm.model.config.text_config._attn_implementation = "flex_attention"
    with pytest.raises(NotImplementedError, match="'eager' or 'sdpa', not 'flex_attention'"):
        decoder_of(vlm)


def test_misuse_is_refused_and_changes_nothing(llava: HuggingFaceVLM) -> None:
    encoded = llava.encode(examples(2))
    with pytest.raises(ValueError, match=r"bool of shape \(2, 36\).*torch.bool of shape \(2, 35\)"):
        StagedForward(llava, encoded, encoded.token_mask[:, 1:])
    run = StagedForward(llava, encoded)
    run.advance(2)
    for layer in (1, 4):
        with pytest.raises(ValueError, match=f"stands at layer 2 of 3 and cannot go to {layer}"):
            run.advance(layer)
    for keep in (encoded.token_mask.long(), encoded.token_mask[:1], encoded.full_selection()):
        with pytest.raises(ValueError, match=r"keep must be bool of shape \(2, 36\)"):
            run.drop(keep)
    words = run.words
    for raters in (words.long(), words[:1], words[:, 1:]):
        with pytest.raises(ValueError, match=rf"raters must be bool of shape \(2, {words.shape[1]}\).*; got torch"):
            run.attention(raters)
    silent = words.clone()
    silent[1] = False
    with pytest.raises(ValueError, match=r"the examples \[1\] have no raters"):
        run.attention(silent)
    with pytest.raises(ValueError, match="'tokens' or 'words', not 'answers'"):
        run.hidden("answers")  # type: ignore[arg-type]
    assert run.layer == 2
    assert run.alive.all()
    run.advance(3)
    for look in (run.attention, run.keys):
        with pytest.raises(ValueError, match="all 3 layers have run"):
            look()
    silent = StagedForward(llava, llava.encode(examples(2), with_answers=False))
    silent.advance(1)
    assert silent.hidden().abs().sum() > 0
    with pytest.raises(ValueError, match="no answers to score"):
        silent.finish()


# -- FLOPs -----------------------------------------------------------------------------------------------


def test_schedules_count_what_pytorch_counts(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples(1))
    config = vlm.model.config
    run = StagedForward(vlm, encoded)
    schedule, before = [], 0
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for layer, share in ((1, 0.5), (2, 0.3)):
            schedule.append((layer - before, int(run.lengths())))
            run.advance(layer)
            run.drop(luck(encoded, share, layer))
            before = layer
        schedule.append((3 - before, int(run.lengths())))
        run.finish()
    heads = 2 * config.text_config.hidden_size * config.text_config.vocab_size * (int(encoded.answer_lengths) - 1)
    assert counter.get_total_flops() - heads == staged_flops(config, schedule)
    assert len({length for _, length in schedule}) == 3
    dense = prefill_flops(config, schedule[0][1])
    assert dense == staged_flops(config, [(3, schedule[0][1])])
    assert flops_saved(config, schedule[0][1], schedule) == pytest.approx(1 - staged_flops(config, schedule) / dense)
    with pytest.raises(ValueError, match=r"has 2 layers, the model 3"):
        staged_flops(config, schedule[:2])


def test_the_decoders_own_signatures_are_what_is_called(llava: HuggingFaceVLM) -> None:
    """Layers swallow unknown keywords, so a renamed one would be dropped in silence."""
    names = inspect.signature(type(decoder_of(llava).layers[0]).forward).parameters
    assert {"hidden_states", "attention_mask", "position_ids", "position_embeddings"} <= set(names)
