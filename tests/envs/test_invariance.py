"""What must not change what an environment pays: batches, padding, caches and the order of the tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import grip_env
from agents.base import top_k
from grip_env.envs.selection import TokenSelectionEnv, TokenSelectionVectorEnv
from grip_env.tasks.base import Example
from grip_env.tasks.scenes import SceneTask
from grip_env.vlms.base import Encoded
from grip_env.vlms.cache.images import PictureCache
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.agents.test_grpo import random_scorer
from tests.fakes import FakeTask, FakeVLM, indices
from tests.vlms import tiny_models
from tests.vlms.decoder.test_staged_forward import build
from tests.vlms.families.test_known import examples

few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
quick = settings(max_examples=50, deadline=None)
SCORER = random_scorer()
any_score = st.floats(allow_nan=False, width=32)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return grip_env.load_vlm("tiny")


@pytest.fixture(scope="module")
def alone(tiny: HuggingFaceVLM) -> list[Encoded]:
    """Examples whose questions and answers differ in length, each encoded by itself."""
    answers = ("red", "red circle", "no", "7", "left", "the green triangle")
    drawn = [SceneTask().example("validation", index) for index in range(6)]
    return [tiny.encode([dataclasses.replace(one, answer=text)]) for one, text in zip(drawn, answers, strict=True)]


def masks(seed: int, rows: int, group: int, count: int) -> torch.Tensor:
    """Random selections of random sizes, bool (rows, group, count)."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(rows, group, 1, generator=generator) ** 2
    return torch.rand(rows, group, count, generator=generator) < share


# -- exactly k -------------------------------------------------------------------------------------------


@quick
@given(
    scores=arrays(np.float32, 16, elements=any_score),
    budget=st.floats(1e-3, 1.0),
    real=st.integers(1, 16),
    index=st.integers(0, 9),
)
def test_scores_keep_exactly_k_real_tokens_none_of_them_worse_than_one_that_is_dropped(
    scores: np.ndarray, budget: float, real: int, index: int
) -> None:
    env = TokenSelectionEnv(
        FakeVLM(count=lambda example: real), FakeTask(), action_mode="scores", budget=budget, max_tokens=16
    )
    _, start = env.reset(options={"index": index})
    info = env.step(scores)[-1]
    assert len(set(indices(info["kept"]))) == len(indices(info["kept"])) == start["k"] == max(1, round(budget * real))
    dropped = sorted(set(range(real)) - set(indices(info["kept"])))
    assert max(indices(info["kept"])) < real
    assert not dropped or scores[dropped].max() <= scores[indices(info["kept"])].min()


@quick
@given(
    chosen=st.sets(st.integers(0, 15)),
    budget=st.floats(1e-3, 1.0),
    real=st.integers(1, 16),
    k=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_binary_actions_keep_what_they_choose_up_to_k_and_blocks_always_k(
    chosen: set[int], budget: float, real: int, k: int, seed: int
) -> None:
    common: dict[str, Any] = {"vlm": FakeVLM(count=lambda example: real), "task": FakeTask()}
    action = np.isin(np.arange(16), list(chosen)).astype(np.int8)
    env = gymnasium.make("GRIP/TokenSelection-v0", budget=budget, max_tokens=16, **common)
    _, start = env.reset(seed=seed)
    info = env.step(action)[-1]
    within = chosen & set(range(real))
    assert set(indices(info["kept"])) <= within
    assert len(indices(info["kept"])) == min(len(within), start["k"])
    assert info["over_budget"] == max(0, len(within) - start["k"])
    blocks = gymnasium.make("GRIP/SmallSelection-v0", k=k, enumerate=False, **common)
    blocks.reset(seed=seed)
    info = blocks.step(action)[-1]
    kept = set(indices(info["kept"]))
    assert len(indices(info["kept"])) == len(kept) == min(k, real)
    assert kept <= within or within <= kept


# -- batching and padding --------------------------------------------------------------------------------


@few
@given(
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    group=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    token_budget=st.sampled_from([1, 300, 1200, 16384]),
)
def test_scores_do_not_depend_on_the_batch(
    tiny: HuggingFaceVLM, alone: list[Encoded], rows: list[int], group: int, seed: int, token_budget: int
) -> None:
    selection = masks(seed, len(rows), group, 144)
    vlm = HuggingFaceVLM(tiny.model, tiny.processor, token_budget=token_budget)
    together = vlm.score(Encoded.concatenate([alone[row] for row in rows]), selection)
    for at, row in enumerate(rows):
        found = tiny.score(alone[row], selection[at : at + 1])
        torch.testing.assert_close(found.log_likelihood[0], together.log_likelihood[at], atol=1e-4, rtol=0)
        torch.testing.assert_close(found.kept[0], together.kept[at])


@few
@given(row=st.integers(0, 5), visual=st.integers(0, 40), text=st.integers(0, 30), seed=st.integers(0, 10**6))
def test_scores_do_not_depend_on_padding_nor_on_what_stands_in_it(
    tiny: HuggingFaceVLM, alone: list[Encoded], row: int, visual: int, text: int, seed: int
) -> None:
    plain, selection = alone[row], masks(seed, 1, 2, 144)
    generator = torch.Generator().manual_seed(seed)

    def longer(value: torch.Tensor, more: int) -> torch.Tensor:
        shape = (1, more, *value.shape[2:])
        if value.dtype == torch.bool:
            return torch.cat([value, torch.zeros(shape, dtype=torch.bool)], 1)
        if value.dtype == torch.long:
            return torch.cat([value, torch.randint(0, 50, shape, generator=generator)], 1)
        return torch.cat([value, torch.randn(shape, generator=generator)], 1)

    assert plain.position_ids is not None
    padded = dataclasses.replace(
        plain,
        tokens=longer(plain.tokens, visual),
        token_mask=longer(plain.token_mask, visual),
        positions=longer(plain.positions, visual),
        question=longer(plain.question, text),
        question_mask=longer(plain.question_mask, text),
        input_ids=longer(plain.input_ids, text),
        position_ids=longer(plain.position_ids, text),
        cells=None,
    )
    reaching = torch.cat([selection, torch.ones(1, 2, visual, dtype=torch.bool)], 2)  # selects padding too
    expected, found = tiny.score(plain, selection), tiny.score(padded, reaching)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.kept, expected.kept)


# -- the order of the tokens -----------------------------------------------------------------------------


def permuted(encoded: Encoded, order: Sequence[int], image_token_id: int | None = None) -> Encoded:
    """Bring the visual tokens into another order, each with all that is known of it.

    Args:
        encoded: One example without padding.
        order: Which token comes first, second, ...
        image_token_id: Of a real model: the ids that stand for the tokens carry their places in the text along.
    """
    index = torch.tensor(order)
    moved = {
        name: value[:, index]
        for name in ("tokens", "token_mask", "positions", "deepstack", "cells")
        if (value := getattr(encoded, name)) is not None
    }
    if image_token_id is not None:
        assert encoded.position_ids is not None
        slots = (encoded.input_ids[0] == image_token_id).nonzero().flatten()
        moved["position_ids"] = encoded.position_ids.clone()
        moved["position_ids"][:, slots] = encoded.position_ids[:, slots[index]]
    return dataclasses.replace(encoded, **moved)


class ShuffledVLM(FakeVLM):
    """The same model, whose tokens come in another order."""

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.order = order

    def encode(self, examples: Sequence[Example]) -> Encoded:
        return permuted(super().encode(examples), self.order)


@quick
@given(order=st.permutations(range(16)), index=st.integers(0, 9), k=st.integers(1, 16), seed=st.integers(0, 10**6))
def test_a_permutation_of_the_tokens_permutes_selections_and_changes_no_reward(
    order: list[int], index: int, k: int, seed: int
) -> None:
    """The reward is equivariant where the model sees a set of tokens, each with its place in the picture.

    So is an agent that scores tokens by what they are and where: it keeps the same ones and is paid the same.
    """
    envs = [
        TokenSelectionEnv(vlm, FakeTask(), action_mode="scores", budget=k / 16)
        for vlm in (FakeVLM(), ShuffledVLM(order))
    ]
    (plain, start), (moved, other) = (env.reset(options={"index": index}) for env in envs)
    for name in ("tokens", "positions", "token_mask"):
        np.testing.assert_array_equal(moved[name], plain[name][order])
    assert start["full_log_likelihood"] == other["full_log_likelihood"]
    assert {order[token] for token in indices(other["relevant"])} == set(indices(start["relevant"]))
    scores = np.random.default_rng(seed).normal(size=16)
    _, reward, _, _, info = envs[0].step(scores)
    _, same, _, _, end = envs[1].step(scores[order])
    assert sorted(order[token] for token in indices(end["kept"])) == indices(info["kept"])
    assert same == pytest.approx(reward, abs=1e-6)
    encoded = FakeVLM().encode([FakeTask().example("train", index)])
    count = torch.tensor([k])
    with torch.no_grad():
        scored, again = (SCORER.score(one, count) for one in (encoded, permuted(encoded, order)))
    torch.testing.assert_close(again, scored[:, order], atol=1e-5, rtol=1e-4)
    if scored.unique().numel() == 16 and scored.sort().values.diff().min() > 1e-4:
        chosen = top_k(scored, count, encoded.token_mask)
        assert top_k(again, count, encoded.token_mask).equal(chosen[:, order])


@pytest.mark.parametrize(
    ("kind", "layers", "policy", "invariant"),
    [
        ("llava", 1, "original", True),
        ("llava", 1, "reindex", False),
        ("llava", 3, "original", False),
        ("paligemma", None, "original", True),
        ("paligemma", None, "reindex", False),
    ],
)
def test_order_matters_to_a_real_model_only_as_far_as_its_visual_tokens_look_back_at_each_other(
    kind: str, layers: int | None, policy: Any, invariant: bool
) -> None:
    """When does a language model see its visual tokens as a set, each with its place in the text?

    Rotary positions follow the position ids, which ``position_policy="original"`` lets every token carry along; the
    causal mask follows the order of the sequence. Keys and values of the first layer depend on a token and its id
    alone, and what comes after the picture attends to all of them: a model of one layer is invariant. So is one of any
    depth whose visual tokens all see each other, as PaliGemma's do. In a deeper causal model a token's hidden state
    depends on which tokens stand before it: there the order is part of the input, and no permutation of it is
    promised to pay alike. With "reindex" the ids themselves follow the order, and nothing is invariant.
    """
    model = build(kind, layers) if layers else HuggingFaceVLM(*tiny_models.build(kind))
    vlm = HuggingFaceVLM(model.model, model.processor, position_policy=policy)
    gaps = []
    for seed, example in enumerate(examples(3)):
        encoded = vlm.encode([example])
        count = encoded.token_mask.shape[1]
        assert encoded.token_mask.all()
        order = np.random.default_rng(seed).permutation(count).tolist()
        selection = masks(seed, 1, 4, count) | (torch.arange(count) < 2)
        expected = vlm.log_likelihood(encoded, selection)
        found = vlm.log_likelihood(permuted(encoded, order, vlm.family.image_token_id), selection[..., order])
        gaps.append(float((found - expected).abs().max()))
    assert max(gaps) < 1e-4 if invariant else min(gaps) > 1e-3, gaps


def test_a_permuted_sequence_is_the_old_one_with_the_causal_mask_permuted(
    tiny: HuggingFaceVLM, alone: list[Encoded]
) -> None:
    """What order does to a deep causal model, exactly: the mask alone moves, so that what it pays is still defined."""
    vlm, encoded = tiny, alone[3]
    order = np.random.default_rng(0).permutation(144).tolist()
    selection = masks(1, 1, 3, 144) | (torch.arange(144) < 2)
    found = vlm.log_likelihood(permuted(encoded, order, vlm.family.image_token_id), selection[..., order])
    assert (found - vlm.log_likelihood(encoded, selection)).abs().max() > 1e-3
    ids = encoded.input_ids[0]
    slots = (ids == vlm.family.image_token_id).nonzero().flatten()
    rank = torch.arange(len(ids))
    rank[slots[order]] = slots  # where each id of the old sequence stands in the new one
    embeds = vlm.model.get_input_embeddings()(ids)
    embeds[slots] = encoded.tokens[0]
    answer = int(encoded.answer_lengths)
    for at, keep in enumerate(selection[0]):
        there = torch.ones(len(ids), dtype=torch.bool)
        there[slots] = keep
        sees = (rank[:, None] >= rank) & there
        with torch.no_grad():
            logits = vlm.model.lm_head(
                vlm.model.model.language_model(
                    inputs_embeds=embeds[None],
                    attention_mask=torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None],
                    position_ids=torch.arange(len(ids))[None],
                ).last_hidden_state
            )[0, -answer - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, ids[-answer:, None]).mean()
        torch.testing.assert_close(found[0, at], expected, atol=1e-4, rtol=0)


# -- caches ----------------------------------------------------------------------------------------------


@settings(quick, max_examples=20)
@given(
    visits=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    cache_size=st.sampled_from([0, 1, 2]),
    seed=st.integers(0, 99),
)
def test_the_memory_of_instances_changes_no_result(visits: list[int], cache_size: int, seed: int) -> None:
    def rollout(size: int) -> list[Any]:
        env = TokenSelectionEnv(FakeVLM(), FakeTask(), budget=(0.1, 0.9), cache_size=size)
        envs = TokenSelectionVectorEnv(2, FakeVLM(), FakeTask(), budget=(0.1, 0.9), cache_size=size)
        env.action_space.seed(seed)
        envs.action_space.seed(seed)
        found: list[Any] = [env.reset(seed=seed), envs.reset(seed=seed)]
        for index in visits:
            found += [env.reset(options={"index": index}), env.step(env.action_space.sample()), env.reset()]
            found += [envs.reset(options={"index": [index, 4 - index]}), envs.step(envs.action_space.sample())]
        return found

    assert data_equivalence(rollout(cache_size), rollout(256), exact=True)


@settings(few, max_examples=3)
@given(visits=st.lists(st.integers(0, 3), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_pictures_on_disk_and_instances_in_memory_change_no_result(
    tiny: HuggingFaceVLM, tmp_path: Path, visits: list[int], seed: int
) -> None:
    def rollout(size: int, cache: PictureCache | None) -> list[Any]:
        vlm = HuggingFaceVLM(tiny.model, tiny.processor, cache=cache)
        env = TokenSelectionEnv(vlm, SceneTask(), "validation", budget=(0.03, 0.5), max_tokens=144, cache_size=size)
        env.action_space.seed(seed)
        found: list[Any] = []
        for index in visits:
            found.append(env.reset(seed=seed, options={"index": index}))
            found.append(env.step(env.action_space.sample()))
        return found

    expected, cache = rollout(256, None), PictureCache(tmp_path)
    for size, store in ((0, None), (1, None), (0, cache), (256, cache), (0, PictureCache(tmp_path))):
        assert data_equivalence(rollout(size, store), expected, exact=True)
    assert cache.statistics.hits > 0
