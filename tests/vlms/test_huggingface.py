"""The adapter against independent ways to compute the same: above all, masking instead of dropping."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoProcessor,
    BertConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from agents.grpo import GRPO, GRPOConfig
from agents.pool import ExamplePool
from agents.scorer import Scorer, ScorerConfig
from grip_env.pretraining.embedded_models import build_model, build_processor
from grip_env.tasks.base import Example
from grip_env.tasks.scenes import SceneTask
from grip_env.vlms import load_vlm
from grip_env.vlms.base import Encoded
from grip_env.vlms.huggingface import HuggingFaceVLM

SIZES = (0, 1, 5, 14, 60, 143)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of other sizes with a tokenizer as Llama's: spaces are part of words, the first token is added."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    lines = ["USER: what is it? is there a red circle? ASSISTANT: yes", "red blue green left right no circle"]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    side = {"height": 42, "width": 42}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size=side),
        tokenizer=fast,
        patch_size=6,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}USER: {% for content in message['content'] %}"
            "{% if content['type'] == 'image' %}<image>\n{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
            "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
        ),
    )
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=42,
        patch_size=6,
        initializer_range=0.3,
    )
    text = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=fast.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=49,
    )
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(10)
    folder = tmp_path_factory.mktemp("llava") / "other"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_vlm(llava_folder: Path) -> HuggingFaceVLM:
    vlm = HuggingFaceVLM.from_pretrained(llava_folder)
    vlm.processor = AutoProcessor.from_pretrained(llava_folder, backend="pil")  # whole, for the tests to call
    return vlm


@pytest.fixture(params=["eager", "sdpa", "other"])
def vlm(request: pytest.FixtureRequest, random_vlm: HuggingFaceVLM, other_vlm: HuggingFaceVLM) -> Iterator[Any]:
    """The embedded architecture under both attention implementations, and the other model."""
    if request.param == "other":
        yield other_vlm
        return
    random_vlm.model.set_attn_implementation(request.param)
    yield random_vlm
    random_vlm.model.set_attn_implementation("eager")


def ask(examples: list[Example], *answers: str) -> list[Example]:
    """The same pictures with questions of several lengths and the given answers."""
    questions = ("what is it?", "is there a red circle?", "red?", "is there an orange circle left of it, or right?")
    return [
        dataclasses.replace(examples[row % len(examples)], question=questions[row % 4], answer=answer)
        for row, answer in enumerate(answers)
    ]


def subsets(encoded: Encoded, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> torch.Tensor:
    """Random selections of the given sizes, and all tokens: bool (B, len(sizes) + 1, N)."""
    batch, tokens = encoded.token_mask.shape
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(batch, len(sizes), tokens, generator=generator).argsort(-1).argsort(-1)
    return torch.cat([rank < torch.tensor(sizes)[:, None], encoded.full_selection()], 1)


def masked_forward(vlm: Any, example: Example, keep: torch.Tensor, more: str, reindex: bool = False) -> Any:
    """Run processor and model on the full sequence, dropped tokens hidden from attention: ids (L,), logits (L, V)."""
    prompt = vlm.prompt(example.question)
    special = not prompt.startswith(vlm.processor.tokenizer.bos_token)
    inputs = vlm.processor(images=example.image, text=prompt + more, return_tensors="pt", add_special_tokens=special)
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[ids == vlm.model.config.image_token_id] = keep.long()
    places = (mask.cumsum(1) - 1).clamp_min(0) if reindex else torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        logits = vlm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            pixel_values=inputs["pixel_values"],
            use_cache=False,
        ).logits
    return ids[0], logits[0]


def masked_log_likelihood(vlm: Any, example: Example, keep: torch.Tensor, reindex: bool = False) -> float:
    prompt_ids, _ = masked_forward(vlm, example, keep, "")
    ids, logits = masked_forward(vlm, example, keep, f" {example.answer}", reindex)
    start = len(prompt_ids)
    assert ids[:start].tolist() == prompt_ids.tolist()
    assert len(ids) > start
    chosen = logits[start - 1 : -1].log_softmax(-1).gather(1, ids[start:, None])
    return float(chosen.mean())


# -- the oracle ------------------------------------------------------------------------------------------


def test_dropping_tokens_equals_masking_them_in_the_full_sequence(vlm: Any, scene_examples: list[Example]) -> None:
    encoded = vlm.encode(ask(scene_examples, "red", "green", "left", "no", "red circle", "it is blue"))
    sizes = tuple(min(size, encoded.token_mask.shape[1] - 1) for size in SIZES)
    selection = subsets(encoded, sizes)
    found = vlm.score(encoded, selection).log_likelihood
    expected = [
        [masked_log_likelihood(vlm, example, keep) for keep in selection[row]]
        for row, example in enumerate(encoded.examples)
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)
    assert (found.std(1) > 0.05).all(), "selections must matter, or this shows nothing"


def test_whole_distributions_equal_those_of_the_masked_sequence(
    random_vlm: HuggingFaceVLM, scene_examples: list[Example]
) -> None:
    words = ["red", "orange", "yes", "no", "left", "right", "7", "star", "blue", "ring"]
    keep = subsets(random_vlm.encode(scene_examples[:1]), (9,))[0, :1]
    encoded = random_vlm.encode([dataclasses.replace(scene_examples[0], answer=word) for word in words])
    found = random_vlm.score(encoded, keep.expand(len(words), 1, -1)).log_likelihood[:, 0]
    _, logits = masked_forward(random_vlm, scene_examples[0], keep[0], "")
    ids = [random_vlm.processor.tokenizer.encode(f" {word}")[0] for word in words]
    torch.testing.assert_close(found, logits[-1].log_softmax(-1)[ids], atol=1e-4, rtol=0)


def test_generation_equals_greedy_decoding_of_the_masked_sequence(vlm: Any, scene_examples: list[Example]) -> None:
    encoded = vlm.encode(ask(scene_examples, "red", "green"))
    selection = subsets(encoded, (0, 7))
    tokenizer = vlm.processor.tokenizer
    for row, texts in enumerate(vlm.generate(encoded, selection, max_new_tokens=3)):
        example = encoded.examples[row]
        for keep, text in zip(selection[row], texts, strict=True):
            prompt, logits = masked_forward(vlm, example, keep, "")
            new = [int(logits[-1].argmax())]
            inputs = vlm.processor(images=example.image, text=vlm.prompt(example.question), return_tensors="pt")
            placeholder = vlm.model.config.image_token_id
            while len(new) < 3 and new[-1] not in (tokenizer.eos_token_id, placeholder):
                ids = torch.cat([prompt, torch.tensor(new)])[None]
                mask = torch.ones_like(ids)
                mask[ids == vlm.model.config.image_token_id] = keep.long()
                with torch.no_grad():
                    logits = vlm.model(
                        input_ids=ids,
                        attention_mask=mask,
                        position_ids=torch.arange(ids.shape[1])[None],
                        pixel_values=inputs["pixel_values"],
                        use_cache=False,
                    ).logits
                new.append(int(logits[0, -1].argmax()))
            expected = tokenizer.decode(new, skip_special_tokens=True).strip()
            if new[-1] == placeholder:  # random weights may say it; the full sequence cannot go on from there
                assert text.startswith(expected)
            else:
                assert text == expected


def test_reindexed_positions_renumber_what_is_kept(random_vlm: HuggingFaceVLM, scene_examples: list[Example]) -> None:
    renumbered = HuggingFaceVLM(random_vlm.model, random_vlm.processor, position_policy="reindex")
    encoded = renumbered.encode(scene_examples[:3])
    selection = subsets(encoded, (0, 14, 60))
    found = renumbered.score(encoded, selection).log_likelihood
    expected = [
        [masked_log_likelihood(renumbered, example, keep, reindex=True) for keep in selection[row]]
        for row, example in enumerate(encoded.examples)
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)
    original = random_vlm.score(encoded, selection).log_likelihood
    assert ((found - original)[:, :3].abs() > 1e-3).all()
    torch.testing.assert_close(found[:, 3], original[:, 3], atol=1e-5, rtol=0)  # with all kept there are no gaps


# -- batching --------------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_the_batch(vlm: Any, scene_examples: list[Example]) -> None:
    encoded = vlm.encode(ask(scene_examples, "red", "red circle", "no", "left", "green"))
    selection = subsets(encoded, (0, 3, 14, 40))
    together = vlm.score(encoded, selection)
    one_by_one = HuggingFaceVLM(vlm.model, vlm.processor, token_budget=1).score(encoded, selection)
    some_by_some = HuggingFaceVLM(vlm.model, vlm.processor, token_budget=400).score(encoded, selection)
    for other in (one_by_one, some_by_some):
        torch.testing.assert_close(together.log_likelihood, other.log_likelihood, atol=1e-4, rtol=0)
        assert together.correct.equal(other.correct)
    for row in range(len(encoded)):
        alone = vlm.encode(encoded.examples[row : row + 1])
        torch.testing.assert_close(
            vlm.score(alone, selection[row : row + 1]).log_likelihood,
            together.log_likelihood[row : row + 1],
            atol=1e-4,
            rtol=0,
        )


def test_token_budget_bounds_every_call_of_the_model(
    random_vlm: HuggingFaceVLM, scene_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    forward = random_vlm.model.forward

    def recorded(*args: Any, **options: Any) -> Any:
        calls.append(tuple(options["input_ids"].shape))
        return forward(*args, **options)

    monkeypatch.setattr(random_vlm.model, "forward", recorded)
    encoded = random_vlm.encode(scene_examples)
    selection = subsets(encoded)
    HuggingFaceVLM(random_vlm.model, random_vlm.processor, token_budget=500).score(encoded, selection)
    assert len(calls) > 5
    assert all(rows == 1 or rows * length <= 500 for rows, length in calls)
    lengths = (encoded.lengths[:, None] - 144 + selection.sum(-1)).flatten().sort().values
    assert sum(rows for rows, _ in calls) == len(lengths)
    # only what is kept is computed: padding stays small beside the tokens themselves
    assert sum(rows * length for rows, length in calls) < 1.3 * int(lengths.sum())


def test_selections_can_come_in_any_order(random_vlm: HuggingFaceVLM, scene_examples: list[Example]) -> None:
    encoded = random_vlm.encode(scene_examples)
    selection = subsets(encoded)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    scores = random_vlm.score(encoded, selection)
    permuted = random_vlm.score(encoded, selection[:, order])
    torch.testing.assert_close(permuted.log_likelihood, scores.log_likelihood[:, order], atol=1e-5, rtol=0)
    assert permuted.correct.equal(scores.correct[:, order])
    assert scores.log_likelihood.unique().numel() == scores.log_likelihood.numel()
    answers, permuted_answers = (random_vlm.generate(encoded, chosen, 1) for chosen in (selection, selection[:, order]))
    assert [[row[place] for place in order] for row in answers] == permuted_answers


def test_scores_are_float32_whatever_the_precision_of_the_model(
    random_vlm: HuggingFaceVLM, scene_examples: list[Example]
) -> None:
    half = HuggingFaceVLM(copy.deepcopy(random_vlm.model).bfloat16(), random_vlm.processor)
    encoded = half.encode(scene_examples[:2])
    assert encoded.tokens.dtype == torch.bfloat16
    found = half.score(encoded, subsets(encoded)).log_likelihood
    assert found.dtype == torch.float32
    assert (found.bfloat16() != found).any()  # rounded scores would tie, and groups of equal rewards teach nothing


# -- encoding --------------------------------------------------------------------------------------------


def test_encoding_is_what_processor_and_model_give_directly(vlm: Any, scene_examples: list[Example]) -> None:
    examples = ask(scene_examples, "red", "red circle", "no", "left")
    encoded = vlm.encode(examples)
    config, tokenizer = vlm.model.config, vlm.processor.tokenizer
    for row, example in enumerate(examples):
        prompt = vlm.prompt(example.question)
        special = not prompt.startswith(tokenizer.bos_token)
        inputs = vlm.processor(images=example.image, text=prompt, return_tensors="pt", add_special_tokens=special)
        with torch.no_grad():
            features = vlm.model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        torch.testing.assert_close(encoded.tokens[row], features.pooler_output[0], atol=1e-5, rtol=1e-5)
        length, answer = int(encoded.lengths[row]), int(encoded.answer_lengths[row])
        ids = encoded.input_ids[row]
        assert ids[: length - answer].tolist() == inputs["input_ids"][0].tolist()
        assert ids.tolist().count(tokenizer.bos_token_id) == 1
        assert int((ids == config.image_token_id).sum()) == encoded.token_mask.shape[1]
        assert tokenizer.decode(ids[length - answer : length]).strip() == example.answer
        assert not ids[length:].any()
        words = tokenizer(example.question, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        assert encoded.question_mask[row].sum() == len(words)
        embeddings = vlm.model.get_input_embeddings().weight.detach()
        torch.testing.assert_close(encoded.question[row, : len(words)], embeddings[words])
        assert not encoded.question[row, len(words) :].any()
    side = config.vision_config.image_size // config.vision_config.patch_size
    assert encoded.token_mask.shape == (4, side * side)
    assert encoded.token_mask.all()
    centres = [((row + 0.5) / side, (column + 0.5) / side) for row in range(side) for column in range(side)]
    torch.testing.assert_close(encoded.positions, torch.tensor(centres).expand(4, -1, -1))
    assert vlm.width == encoded.tokens.shape[-1] == encoded.question.shape[-1]


def test_positions_follow_the_picture(random_vlm: HuggingFaceVLM, scene_examples: list[Example]) -> None:
    """A change in one patch changes the tower's input embedding of the token with that position, and no other."""
    image = scene_examples[0].image
    changed = image.copy()
    changed[16:24, 72:80] = 255 - changed[16:24, 72:80]
    examples = [dataclasses.replace(scene_examples[0], image=picture) for picture in (image, changed)]
    encoded = random_vlm.encode(examples)
    pixels = random_vlm.processor.image_processor(images=[image, changed], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embedded = random_vlm.model.model.vision_tower.embeddings(pixels)[:, 1:]
    differs = (embedded[0] - embedded[1]).abs().amax(-1) > 1e-6
    assert differs.sum() == 1
    torch.testing.assert_close(encoded.positions[0, differs][0], torch.tensor([20 / 96, 76 / 96]))


def test_answers_of_several_tokens_score_the_mean_and_are_right_only_as_a_whole(
    random_vlm: HuggingFaceVLM, scene_examples: list[Example]
) -> None:
    tokenizer = random_vlm.processor.tokenizer
    first = random_vlm.encode(scene_examples[:1])
    selection = subsets(first, (14,))
    (said, *_), *_ = random_vlm.generate(first, selection, 2)
    assert len(tokenizer.encode(f" {said}")) == 2
    wrong = said.split()[0] + " zebra"
    encoded = random_vlm.encode([dataclasses.replace(scene_examples[0], answer=text) for text in (said, wrong)])
    assert encoded.answer_lengths.tolist() == [2, len(tokenizer.encode(f" {wrong}"))]
    scores = random_vlm.score(encoded, selection.expand(2, -1, -1))
    assert scores.correct[:, 0].tolist() == [True, False]
    expected = masked_log_likelihood(random_vlm, encoded.examples[1], selection[0, 0])
    assert float(scores.log_likelihood[1, 0]) == pytest.approx(expected, abs=1e-4)


def test_correct_means_that_generation_gives_the_answer(random_vlm: HuggingFaceVLM) -> None:
    task = SceneTask()
    examples = [task.example("train", index) for index in range(8)]
    encoded = random_vlm.encode(examples)
    selection = subsets(encoded, (0, 1, 2, 4, 8, 14, 30, 50, 80, 110))
    said = random_vlm.generate(encoded, selection, 1)
    # ask for what the model says with few tokens, so that there are right and wrong answers
    encoded = random_vlm.encode(
        [dataclasses.replace(example, answer=row[3]) for example, row in zip(examples, said, strict=True)]
    )
    correct = random_vlm.score(encoded, selection).correct
    assert 0.1 < correct.float().mean() < 0.9
    assert correct.tolist() == [[text == row[3] for text in row] for row in said]


def test_batches_can_be_sliced_and_joined(random_vlm: HuggingFaceVLM, scene_examples: list[Example]) -> None:
    parts = [random_vlm.encode(ask(scene_examples, *answers)) for answers in (("no",), ("red", "it is a red circle"))]
    joined = Encoded.concatenate(parts)
    assert len(joined) == 3
    assert [example.answer for example in joined.examples] == ["no", "red", "it is a red circle"]
    assert joined.input_ids.shape[1] == max(part.input_ids.shape[1] for part in parts)
    assert parts[0].question.shape[1] < joined.question.shape[1]
    assert not joined.question_mask[0, parts[0].question.shape[1] :].any()
    selection = subsets(joined, (5, 20))
    scores = random_vlm.score(joined, selection)
    for part, rows in zip(parts, (slice(0, 1), slice(1, 3)), strict=True):
        found = random_vlm.score(part, selection[rows]).log_likelihood
        torch.testing.assert_close(found, scores[rows].log_likelihood, atol=1e-4, rtol=0)
    for rows in ([2, 0], slice(1, None), torch.tensor([1, 1])):
        taken = joined[rows]
        index = torch.arange(3)[rows] if isinstance(rows, slice) else torch.as_tensor(rows)
        assert [example.answer for example in taken.examples] == [joined.examples[row].answer for row in index]
        again = random_vlm.score(taken, selection[index]).log_likelihood
        torch.testing.assert_close(again, scores.log_likelihood[index], atol=1e-4, rtol=0)


def test_relevance_reads_the_examples_grid_at_each_token(
    random_vlm: HuggingFaceVLM, other_vlm: HuggingFaceVLM, scene_examples: list[Example]
) -> None:
    grids = torch.from_numpy(np.stack([example.relevance for example in scene_examples]))
    found = random_vlm.encode(scene_examples).relevance()
    assert found is not None
    torch.testing.assert_close(found, grids.flatten(1))  # one token per cell
    coarse = other_vlm.encode(scene_examples).relevance()
    assert coarse is not None
    centres = ((np.arange(7) + 0.5) / 7 * 12).astype(int)
    torch.testing.assert_close(coarse, grids[:, centres][:, :, centres].flatten(1))
    unknown = [*scene_examples[:1], dataclasses.replace(scene_examples[1], relevance=None)]
    assert random_vlm.encode(unknown).relevance() is None


# -- attention and gradients -----------------------------------------------------------------------------


def test_cls_attention_is_that_of_the_layer_the_features_come_from(vlm: Any, scene_examples: list[Example]) -> None:
    found = vlm.attention(vlm.encode(scene_examples[:2]), "cls")
    layer = vlm.model.config.vision_feature_layer
    tower = vlm.model.model.vision_tower
    images = [example.image for example in scene_examples[:2]]
    pixels = vlm.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[layer - 1]  # what that layer reads
        block = next(part for name, part in tower.named_modules() if name.endswith("encoder.layers"))[layer]
        x = block.layer_norm1(hidden)
        heads = tower.config.num_attention_heads
        q, k = (
            part(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)  # (B, heads, 1 + N, 1 + N)
    torch.testing.assert_close(found, weights[:, :, 0, 1:].mean(1), atol=1e-6, rtol=1e-4)
    assert (found > 0).all()
    assert found.std() > 0


def test_attention_leaves_the_model_as_it_was(random_vlm: HuggingFaceVLM, scene_examples: list[Example]) -> None:
    random_vlm.model.set_attn_implementation("sdpa")
    encoded = random_vlm.encode(scene_examples[:1])
    random_vlm.attention(encoded)
    assert random_vlm.model.model.vision_tower.config._attn_implementation == "sdpa"
    random_vlm.model.set_attn_implementation("eager")
    with pytest.raises(NotImplementedError, match=r"'rollout'.*'cls'"):
        random_vlm.attention(encoded, "rollout")


def test_gradients_flow_to_the_tokens_kept_and_nowhere_else(vlm: Any, scene_examples: list[Example]) -> None:
    encoded = vlm.encode(ask(scene_examples, "red", "no"))
    selection = subsets(encoded, (6,))[:, :1]
    tokens = encoded.tokens.clone().requires_grad_()
    value = vlm.log_likelihood(encoded, selection, tokens)
    (gradient,) = torch.autograd.grad(value.sum(), tokens)
    assert (gradient.abs().sum(-1) > 0).equal(selection[:, 0])
    assert all(weight.grad is None and not weight.requires_grad for weight in vlm.model.parameters())
    assert encoded.tokens.grad is None
    assert not vlm.log_likelihood(encoded, selection).requires_grad
    with torch.no_grad():
        assert not vlm.log_likelihood(encoded, selection, tokens).requires_grad


def test_gradient_is_the_slope_of_the_log_likelihood(random_vlm: HuggingFaceVLM, scene_examples: list[Example]) -> None:
    encoded = random_vlm.encode(scene_examples[:2])
    selection = subsets(encoded, (20,))[:, :1]
    tokens = encoded.tokens.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(random_vlm.log_likelihood(encoded, selection, tokens).sum(), tokens)
    step = 1e-2 * torch.nn.functional.normalize(gradient.flatten(1), dim=1).view_as(gradient)
    up, down = (random_vlm.log_likelihood(encoded, selection, encoded.tokens + sign * step) for sign in (1, -1))
    slope = (up - down)[:, 0] / 2e-2
    torch.testing.assert_close(slope, gradient.flatten(1).norm(dim=1), rtol=0.05, atol=1e-3)


def test_log_likelihood_and_score_agree(vlm: Any, scene_examples: list[Example]) -> None:
    encoded = vlm.encode(ask(scene_examples, "red", "no", "red circle"))
    selection = subsets(encoded, (0, 9))
    score = vlm.score(encoded, selection).log_likelihood
    tokens = encoded.tokens.clone().requires_grad_()
    torch.testing.assert_close(vlm.log_likelihood(encoded, selection), score, atol=1e-5, rtol=0)
    torch.testing.assert_close(vlm.log_likelihood(encoded, selection, tokens).detach(), score, atol=1e-5, rtol=0)


# -- frozen ----------------------------------------------------------------------------------------------


def test_training_leaves_every_weight_as_it_was(random_vlm: HuggingFaceVLM) -> None:
    before = random_vlm.checksum()
    scorer = Scorer(ScorerConfig(token_width=random_vlm.width, width=16, blocks=1, heads=2))
    config = GRPOConfig(steps=2, instances=4, candidates=1, group=2, warmup_steps=2, pool=4, teacher="gradient")
    pool = ExamplePool(random_vlm, SceneTask(), size=4)
    phases = [metrics.phase for metrics in GRPO(random_vlm, pool, scorer, config).train()]
    assert phases == ["warmup", "warmup", "grpo", "grpo"]
    assert random_vlm.checksum() == before
    assert not random_vlm.model.training
    assert not any(weight.requires_grad or weight.grad is not None for weight in random_vlm.model.parameters())


def test_checksum_sees_a_change_in_the_last_digit() -> None:
    processor = build_processor()
    vlm = HuggingFaceVLM(build_model(processor.tokenizer), processor)
    before = vlm.checksum()
    assert before == HuggingFaceVLM(build_model(processor.tokenizer), processor).checksum()
    with torch.no_grad():
        weight = vlm.model.model.language_model.layers[-1].mlp.down_proj.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    assert vlm.checksum() != before


def test_copies_share_the_model(random_vlm: HuggingFaceVLM) -> None:
    assert copy.deepcopy(random_vlm) is random_vlm


# -- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "selection",
    [torch.ones(2, 1, 144), torch.ones(2, 144, dtype=torch.bool), torch.ones(2, 1, 143, dtype=torch.bool)],
)
@pytest.mark.parametrize("method", ["score", "generate", "log_likelihood"])
def test_selections_of_another_kind_are_refused_with_the_shape_expected(
    random_vlm: HuggingFaceVLM, scene_examples: list[Example], method: str, selection: torch.Tensor
) -> None:
    encoded = random_vlm.encode(scene_examples[:2])
    with pytest.raises(ValueError, match=r"bool of shape \(2, G, 144\); got torch\.\w+ of shape \(2, "):
        getattr(random_vlm, method)(encoded, selection)


def test_examples_that_cannot_be_scored_are_refused(vlm: Any, scene_examples: list[Example]) -> None:
    with pytest.raises(ValueError, match="at least one example"):
        vlm.encode([])
    with pytest.raises(ValueError, match="'' has no tokens: give a non-empty answer"):
        vlm.encode(ask(scene_examples, "red", ""))
    with pytest.raises(ValueError, match="exactly one image placeholder"):
        vlm.encode([dataclasses.replace(scene_examples[0], question="what does <image> show?")])


def test_models_that_cannot_be_used_are_refused(random_vlm: HuggingFaceVLM, tmp_path: Path) -> None:
    model, processor = random_vlm.model, random_vlm.processor

    class Other(torch.nn.Module):
        config = BertConfig()

    with pytest.raises(ValueError, match="'bert' is not supported; supported: gemma3, idefics3, internvl, llava, "):
        HuggingFaceVLM(Other(), processor)
    bare = copy.copy(processor)
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template: set processor\.chat_template"):
        HuggingFaceVLM(model, bare)
    with pytest.raises(ValueError, match="'original' or 'reindex', not 'gapped'"):
        HuggingFaceVLM(model, processor, position_policy="gapped")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*empty: give a folder that save_pretrained wrote"):
        load_vlm(tmp_path / "empty")


def test_loaded_model_has_the_folders_name_and_float32(other_vlm: HuggingFaceVLM, llava_folder: Path) -> None:
    assert other_vlm.name == "other"
    assert {weight.dtype for weight in other_vlm.model.parameters()} == {torch.float32}
    assert load_vlm(llava_folder).checksum() == other_vlm.checksum()
    assert other_vlm.width == 32


@pytest.mark.parametrize("kind", ["cls", "received"])
def test_attention_of_the_last_batch_is_remembered_and_given_as_a_copy(
    random_vlm: HuggingFaceVLM, scene_examples: list[Example], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = pickle.loads(pickle.dumps(random_vlm))
    runs: list[int] = []
    for name in ("views", "received_attention"):
        real = getattr(vlm.family, name)

        def counted(images: Any, real: Any = real) -> Any:
            runs.append(len(images))
            return real(images)

        monkeypatch.setattr(vlm.family, name, counted)
    first, second = vlm.encode(scene_examples[:2]), vlm.encode(scene_examples[2:5])
    runs.clear()
    expected = vlm.attention(first, kind)
    once = len(runs)
    vlm.attention(first, kind)[:] = 7.0
    torch.testing.assert_close(vlm.attention(first, kind), expected, rtol=0, atol=0)
    assert len(runs) == once
    assert len(vlm.attention(second, kind)) == 3
    torch.testing.assert_close(vlm.attention(first, kind), expected)
    assert len(runs) == 3 * once
    assert vlm.__getstate__()["_attended"] == {}
