"""Pruned generation: whatever the options, as the full sequence with the dropped tokens masked and places kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, WatermarkingConfig
from transformers.generation import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from agents.pruner import Pruner
from agents.scorer import Scorer, ScorerConfig
from agents.selectors import ScorerSelector
from grip_env.vlms.base import Encoded
from grip_env.vlms.blocks import BlockVLM
from grip_env.vlms.encoding import _longest
from grip_env.vlms.families.known import FAMILIES
from grip_env.vlms.generation.decoding import CACHE
from grip_env.vlms.generation.options import _REFUSED, _TAKEN, _UNUSED
from grip_env.vlms.huggingface import HuggingFaceVLM
from grip_env.vlms.processor_inputs import encode_inputs, split_inputs
from tests.vlms import tiny_models
from tests.vlms.families.test_known import examples, make
from tests.vlms.test_processor_inputs import process, sizes

NEW = 6


def pruner_of(kind: str) -> Pruner:
    vlm = make(kind)
    torch.manual_seed(0)
    scorer = Scorer(ScorerConfig(token_width=vlm.width, width=16, heads=2)).eval()
    torch.nn.init.normal_(scorer.out[1].weight)  # type: ignore[arg-type]
    return Pruner(vlm, ScorerSelector(scorer))


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pruner(request: pytest.FixtureRequest) -> Pruner:
    return pruner_of(str(request.param))


@pytest.fixture(scope="module")
def llava() -> Pruner:
    return pruner_of("llava")


def left(row: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (length - row.shape[-1], 0))


def masked(pruner: Pruner, inputs: dict[str, Any], encoded: Encoded, selection: torch.Tensor) -> dict[str, Any]:
    """Return the inputs of the model's own generate: the whole sequences, dropped tokens masked, places kept."""
    family = pruner.vlm.family
    ids, mask = inputs["input_ids"], inputs["attention_mask"].clone()
    for row in range(len(ids)):
        visual = (ids[row] == family.image_token_id) & mask[row].bool()
        mask[row][visual] = selection[row][encoded.token_mask[row]].long()
    assert encoded.position_ids is not None
    rows = [encoded.position_ids[row, : encoded.lengths[row]] - family.first_position for row in range(len(ids))]
    if family.axes == 1:
        places = torch.stack([left(row, ids.shape[1]) for row in rows])
    else:
        places = torch.stack([left(row.T, ids.shape[1]) for row in rows], 1)
    return {**inputs, "attention_mask": mask, "position_ids": places}


def both(pruner: Pruner, count: int, budget: float = 0.3, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is generated from pruned prompts, and by the model itself from masked ones."""
    batch = examples(count)
    inputs = process(pruner, batch)
    encoded = encode_inputs(pruner.vlm, *split_inputs(inputs)[:2], sizes(batch))
    selection = pruner.select(encoded, budget)
    reference = masked(pruner, inputs, encoded, selection)
    torch.manual_seed(1)
    found = pruner.generate(**inputs, **options, budget=budget, sizes=sizes(batch))
    torch.manual_seed(1)
    with torch.no_grad():
        expected = pruner.vlm.model.generate(**reference, **options | {"use_cache": True})
    return found, expected


def slow(pruner: Pruner, reference: dict[str, Any], steps: int) -> list[int]:
    """Return the likeliest tokens, each from a run of its own over the whole masked sequence, without any cache."""
    model, family = pruner.vlm.model, pruner.vlm.family
    ids, mask = reference["input_ids"], reference["attention_mask"]
    places = reference["position_ids"] + family.first_position
    images = split_inputs(reference_inputs(reference))[1]
    length = ids.shape[1]
    new: list[int] = []
    ends = model.generation_config.eos_token_id
    while len(new) < steps and (not new or new[-1] not in (ends if isinstance(ends, list) else [ends])):
        types = family.token_types(ids, torch.arange(ids.shape[1])[None] >= length)
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, **types, **images
            ).logits[:, -1]
        logits[:, family.image_token_id] = -torch.inf
        new.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        places = torch.cat([places, places[..., -1:] + 1], -1)
    return new


def reference_inputs(reference: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in reference.items() if key != "position_ids"}


OPTIONS: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "repetition": {"repetition_penalty": 5.0},
    "encoder repetition": {"encoder_repetition_penalty": 4.0},
    "ngrams": {"no_repeat_ngram_size": 1},
    "pairs": {"no_repeat_ngram_size": 2},
    "encoder ngrams": {"encoder_no_repeat_ngram_size": 1},
    "at least": {"min_new_tokens": 5},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 20, "top_p": 0.9},
    "rare": {"do_sample": True, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 0.001, "eta_cutoff": 0.001},
    "decay": {"exponential_decay_length_penalty": (1, 4.0)},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=20.0, context_width=2)},
    "normal": {"renormalize_logits": True, "remove_invalid_values": True},
    "first": {"forced_bos_token_id": 7, "begin_suppress_tokens": [9, 10]},
    "last": {"forced_eos_token_id": 11},
    "bias": {"sequence_bias": {(12,): 50.0, (12, 13): 90.0}},
    "bad words": {"bad_words_ids": [[12], [13, 14]]},
}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_options_do_as_they_do_with_the_full_sequence_masked(pruner: Pruner, name: str) -> None:
    options = {"max_new_tokens": NEW, "suppress_tokens": [pruner.vlm.family.image_token_id], **OPTIONS[name]}
    # in a batch, without pruning, these options also read the padding of prompts, which they do not do here
    for count in (1,) if name in ("encoder ngrams", "encoder repetition", "ngrams") else (1, 3):
        found, expected = both(pruner, count, **options)
        assert found.tolist() == expected.tolist()


def test_a_prompt_in_chunks_is_answered_as_whole(pruner: Pruner) -> None:
    """The model's own generate refuses to cut pixels to pieces; here the pieces do not matter."""
    inputs = process(pruner, examples(3))
    common = {"budget": 0.3, "sizes": sizes(examples(3)), "max_new_tokens": NEW}
    assert pruner.generate(**inputs, **common, prefill_chunk_size=7).equal(pruner.generate(**inputs, **common))


@pytest.mark.parametrize("use_cache", [True, False])
def test_every_token_is_that_of_a_run_over_the_full_masked_sequence(pruner: Pruner, use_cache: bool) -> None:
    batch = examples(3)
    batched = process(pruner, batch)
    options = {"max_new_tokens": NEW, "suppress_tokens": [pruner.vlm.family.image_token_id], "use_cache": use_cache}
    together = pruner.generate(**batched, **options, budget=0.2, sizes=sizes(batch))
    for row, example in enumerate(batch):
        inputs = process(pruner, [example])
        encoded = encode_inputs(pruner.vlm, *split_inputs(inputs)[:2], sizes([example]))
        selection = pruner.select(encoded, 0.2)
        expected = slow(pruner, masked(pruner, inputs, encoded, selection), NEW)
        alone = pruner.generate(**inputs, **options, budget=0.2, sizes=sizes([example]))
        assert alone[0, inputs["input_ids"].shape[1] :].tolist() == expected
        assert together[row, batched["input_ids"].shape[1] :][: len(expected)].tolist() == expected


@pytest.mark.parametrize(
    "name", ["repetition", "encoder repetition", "ngrams", "pairs", "encoder ngrams", "bad words", "at least"]
)
def test_an_option_finds_nothing_in_the_padding_of_other_prompts(pruner: Pruner, name: str) -> None:
    batch = examples(3)
    options = {
        "max_new_tokens": NEW,
        "suppress_tokens": [pruner.vlm.family.image_token_id],
        "budget": 0.3,
        **OPTIONS[name],
    }
    inputs = process(pruner, batch)
    together = pruner.generate(**inputs, **options, sizes=sizes(batch))[:, inputs["input_ids"].shape[1] :]
    for row, example in enumerate(batch):
        single = process(pruner, [example])
        alone = pruner.generate(**single, **options, sizes=sizes([example]))[0, single["input_ids"].shape[1] :]
        assert together[row, : len(alone)].equal(alone)


SAVED: list[dict[str, Any]] = [
    {"min_new_tokens": 4},
    {"min_length": 10_000},
    {"no_repeat_ngram_size": 1},
    {"num_beams": 3},
    {"max_length": 5},
    {"max_new_tokens": 1},
    {"repetition_penalty": 9.0},
    {"do_sample": True, "temperature": 9.0},
    {"use_cache": False},
    {"suppress_tokens": list(range(5, 300))},
    {"forced_eos_token_id": 5},
    {"bad_words_ids": [[token] for token in range(5, 300)]},
    {"prompt_lookup_num_tokens": 3},
    {"max_time": 1e-9},
    {"stop_strings": [" "]},
    {"token_healing": True},
    {"guidance_scale": 3.0},
    {"return_dict_in_generate": True, "output_scores": True},
    {"cache_implementation": "static"},
]


def test_answers_are_greedy_whatever_is_saved(pruner: Pruner) -> None:
    batch = examples(3)
    images, questions = [one.image for one in batch], [one.question for one in batch]
    expected = pruner.answers(images, questions, 0.5, NEW)
    one = pruner(images[0], questions[0], 0.5, NEW)
    assert one.text == expected[0]
    usual = pruner.vlm.model.generation_config
    for saved in SAVED:
        pruner.vlm.model.generation_config = GenerationConfig(**usual.to_diff_dict() | saved)
        try:
            assert pruner.answers(images, questions, 0.5, NEW) == expected, saved
            again = pruner(images[0], questions[0], 0.5, NEW)
        finally:
            pruner.vlm.model.generation_config = usual
        assert again.text == one.text, saved
        assert again.log_likelihood == pytest.approx(one.log_likelihood, nan_ok=True), saved


@pytest.mark.parametrize("saved", [{"use_cache": False}, {"min_new_tokens": 4}, {"repetition_penalty": 5.0}])
def test_what_is_saved_counts_as_if_it_were_given(pruner: Pruner, saved: dict[str, Any]) -> None:
    batch = examples(2)
    inputs = process(pruner, batch)
    common = {"budget": 0.3, "sizes": sizes(batch), "max_new_tokens": NEW}
    expected = pruner.generate(**inputs, **common, **saved)
    usual = pruner.vlm.model.generation_config
    assert pruner.generate(
        **inputs, **common, generation_config=GenerationConfig(**usual.to_diff_dict() | saved)
    ).equal(expected)
    pruner.vlm.model.generation_config = GenerationConfig(**usual.to_diff_dict() | saved)
    try:
        assert pruner.generate(**inputs, **common).equal(expected)
    finally:
        pruner.vlm.model.generation_config = usual


def test_every_option_of_transformers_is_known() -> None:
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    sorted_out = {*_TAKEN, *_UNUSED, *_REFUSED}
    assert known <= sorted_out, "say of these whether pruned prompts can go on with them"
    assert len(sorted_out) == len(_TAKEN) + len(_UNUSED) + len(_REFUSED)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"guidance_scale": 1.5},
        {"token_healing": True},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"cache_implementation": "quantized"},
        {"cache_implementation": "paged"},
        {"assistant_model": object()},
        {"past_key_values": object()},
        {"custom_generate": "somewhere"},
        {"negative_prompt_ids": torch.zeros(1, 1)},
        {"temprature": 1.0},
        {"vision_feature_layer": -1},
        {"max_new_tokens": 0},
        {"max_new_tokens": "many"},
        {"temperature": "hot"},
        {"suppress_tokens": [10**9]},
        {"stop_strings": [1]},
        {"eos_token_id": torch.ones(2)},
        {"num_beams": torch.ones(2)},
        {"logits_processor": 3},
        {"output_hidden_states": True, "return_dict_in_generate": True, "use_cache": False},
    ],
    ids=lambda options: " ".join(options),
)
def test_what_cannot_be_done_is_refused_by_name(llava: Pruner, options: dict[str, Any]) -> None:
    batch = examples(1)
    with pytest.raises(ValueError, match=next(iter(options))):
        llava.generate(**process(llava, batch), **{"max_new_tokens": 2, **options})


def test_a_new_field_of_transformers_is_refused_until_it_is_known(
    llava: Pruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = GenerationConfig.__init__

    def init(self: GenerationConfig, **more: Any) -> None:
        usual(self, **more)
        self.look_ahead = more.get("look_ahead")

    monkeypatch.setattr(GenerationConfig, "__init__", init)
    with pytest.raises(ValueError, match="look_ahead=3 is not known to give correct answers"):
        llava.generate(**process(llava, examples(1)), max_new_tokens=2, look_ahead=3)


def test_functions_of_the_caller_see_the_prompts_as_given(llava: Pruner) -> None:
    class Seen(BaseStreamer):
        def __init__(self) -> None:
            self.values: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.values.append(value.flatten().tolist())

        def end(self) -> None:
            self.values.append([])

    class Even(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            assert input_ids[:, :length].equal(inputs["input_ids"])
            return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, -torch.inf)

    class Third(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] == length + 3)

    def allowed(row: int, sent: torch.Tensor) -> list[int]:
        assert sent[:length].equal(inputs["input_ids"][row])
        return [40, 41, 42, 44]

    inputs = process(llava, examples(1))
    length = inputs["input_ids"].shape[1]
    streamer = Seen()
    found = llava.generate(
        **inputs,
        budget=0.3,
        max_new_tokens=8,
        logits_processor=[Even()],
        stopping_criteria=[Third()],
        prefix_allowed_tokens_fn=allowed,
        streamer=streamer,
    )
    new = found[0, length:].tolist()
    assert len(new) == 3
    assert set(new) <= {40, 42, 44}
    assert streamer.values == [inputs["input_ids"][0].tolist(), *([token] for token in new), []]


def test_stop_strings_need_no_tokenizer(llava: Pruner) -> None:
    inputs = process(llava, examples(1))
    length = inputs["input_ids"].shape[1]
    words = llava.vlm.family.tokenizer.encode("red circle", add_special_tokens=False)
    common = {"budget": 0.3, "max_new_tokens": NEW, "prefix_allowed_tokens_fn": lambda row, sent: words}
    whole = llava.generate(**inputs, **common)[0, length:]
    text = llava.vlm.family.tokenizer.decode(whole[-1:])
    first = whole.tolist().index(int(whole[-1])) + 1
    found = llava.generate(**inputs, **common, stop_strings=[text])
    assert found[0, length:].equal(whole[:first])


def test_outputs_are_those_asked_for(llava: Pruner) -> None:
    inputs = process(llava, examples(1))
    common = {"budget": 0.3, "max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True}
    found = llava.generate(**inputs, **common, output_scores=True, output_logits=True, output_hidden_states=True)
    assert len(found.scores) == len(found.logits) == len(found.hidden_states) == 3
    assert found.attentions is None
    assert found[CACHE] is not None
    assert llava.generate(**inputs, **common, use_cache=False).get(CACHE) is None


def test_sampling_without_a_token_to_choose_from_is_refused(llava: Pruner) -> None:
    size = llava.vlm.model.get_input_embeddings().weight.shape[0]
    with pytest.raises(ValueError, match="no token to choose from"):
        llava.generate(
            **process(llava, examples(1)), max_new_tokens=2, do_sample=True, suppress_tokens=list(range(size))
        )


@pytest.mark.parametrize("policy", ["original", "reindex"])
def test_sequences_longer_than_the_model_are_refused_at_every_door(policy: Any) -> None:
    """The whole sequence counts, whatever is dropped and however places are numbered."""
    vlm = HuggingFaceVLM(*tiny_models.build("llava"), position_policy=policy)
    pruner = Pruner(vlm, ScorerSelector(Scorer(ScorerConfig(token_width=vlm.width))))
    (example,) = examples(1)
    length = int(vlm.encode([example]).lengths)
    inputs = process(pruner, [example])
    prompt = inputs["input_ids"].shape[1]
    text = vlm.model.config.text_config
    text.max_position_embeddings = length
    assert vlm.encode([example]).lengths.tolist() == [length]
    text.max_position_embeddings = length - 1
    for door in (vlm, BlockVLM(vlm, 2, 2)):
        with pytest.raises(ValueError, match=rf"have {length} tokens, more than the {length - 1} positions"):
            door.encode([example])
    text.max_position_embeddings = prompt + 3
    assert pruner.generate(**inputs, budget=0.1, max_new_tokens=3).shape[1] <= prompt + 3
    message = rf"prompt of {prompt} tokens and 4 new ones .* pass max_new_tokens=3 or less"
    for call in (
        lambda: pruner.generate(**inputs, budget=0.1, max_new_tokens=4),
        lambda: pruner.generate(**inputs, budget=0.1, max_length=prompt + 4),
        lambda: pruner.answers([example.image], [example.question], 0.1, 4),
        lambda: pruner(example.image, example.question, 0.1, 4),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    text.max_position_embeddings = prompt - 1
    with pytest.raises(ValueError, match=rf"have {prompt} tokens, more than the {prompt - 1} positions"):
        pruner.generate(**inputs, budget=0.1, max_new_tokens=1)


def test_all_families_refuse_sequences_that_are_too_long(pruner: Pruner) -> None:
    (example,) = examples(1)
    text = pruner.vlm.model.config.get_text_config()
    usual = text.max_position_embeddings
    length = int(pruner.vlm.encode([example]).lengths)
    try:
        text.max_position_embeddings = length - 1
        with pytest.raises(ValueError, match="max_position_embeddings"):
            pruner.vlm.encode([example])
    finally:
        text.max_position_embeddings = usual


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 100),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 50}, 100),
        ({"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 50}, 100),
        ({"rope_type": "linear", "factor": 2.0}, 200),
        ({"rope_type": "dynamic", "factor": 2.0}, 200),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25}, 100),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}}, 100),  # Gemma 3 states the stretched length
        (None, 100),
    ],
)
def test_stretched_positions_count(rope: Any, limit: int) -> None:
    assert _longest(SimpleNamespace(max_position_embeddings=100, rope_parameters=rope)) == limit
    assert _longest(SimpleNamespace(rope_parameters=rope)) is None
