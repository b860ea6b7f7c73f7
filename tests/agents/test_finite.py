"""NaN and infinities end a training where they occur, and nothing of them gets into weights or onto the disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import agents.training.relaxations as relaxed
import grip_env
from agents.base import keep_best, top_k
from agents.grpo import GRPO
from agents.heuristics import BASELINES
from agents.learning import Learner
from agents.ordered_subset import OrderedSubset
from agents.pool import ExamplePool
from agents.scorer import Scorer
from agents.search import RandomSearch
from agents.selectors import ScorerSelector
from agents.subset import KSubset
from agents.training.imitation import Imitation
from agents.training.options import ImitationConfig, SoftTopKConfig
from agents.training.relaxations import SoftTopK
from grip_env.common.finite import NonFiniteError
from grip_env.tasks.base import Example
from grip_env.vlms.base import Encoded, Scores
from tests.agents.batches import encode
from tests.agents.test_grpo import SMALL, config, random_scorer
from tests.agents.training.test_relaxations import fake_likelihood
from tests.fakes import FakeTask, FakeVLM

BAD = 5
"""The example of the task for which the model gives no number."""


class Broken(FakeVLM):
    """Gives NaN or an infinity for one image, kept whole or pruned."""

    number = math.nan

    def _bad(self, encoded: Encoded) -> torch.Tensor:
        return torch.tensor([example.key == f"train {BAD}" for example in encoded.examples])

    def score(self, encoded: Encoded, *args: Any, **options: Any) -> Scores:
        scores = super().score(encoded, *args, **options)
        scores.log_likelihood[self._bad(encoded)] = self.number
        return scores


class Named(FakeTask):
    """A task whose examples have names."""

    def example(self, split: str, index: int) -> Example:
        found = super().example(split, index)
        return Example(found.image, found.question, found.answer, found.family, found.relevance, f"{split} {index}")


def trainer(**changes: Any) -> GRPO:
    torch.manual_seed(0)
    settings = config(**({"pool": 10, "instances": 4, "warmup_steps": 0, "steps": 12} | changes))
    pool = ExamplePool(Broken(), Named(10), "train", settings.pool, settings.reuse)
    return GRPO(pool.vlm, pool, Scorer(SMALL), settings)


def finite(scorer: torch.nn.Module) -> bool:
    return all(bool(value.isfinite().all()) for value in scorer.state_dict().values())


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("candidates", [1, 2])
def test_grpo_names_the_step_and_the_example(number: float, candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "number", number)
    grpo = trainer(candidates=candidates, probes=2)
    before = {key: value.clone() for key, value in grpo.scorer.state_dict().items()}
    done = 0
    steps = grpo.train()
    message = ""
    while not message:
        try:
            next(steps)
        except NonFiniteError as error:
            message = str(error)
        else:
            done += 1
            before = {key: value.clone() for key, value in grpo.scorer.state_dict().items()}
    assert f"grpo step {done}: the reward, or a log-likelihood, of example 'train {BAD}' is NaN or infinite" in message
    assert all(torch.equal(before[key], value) for key, value in grpo.scorer.state_dict().items())


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("candidates", [1, 2])
def test_grpo_goes_on_without_the_example_and_counts_it(candidates: int, in_turn: bool) -> None:
    torch.manual_seed(0)
    settings = config(
        pool=10, instances=4, warmup_steps=0, steps=6, candidates=candidates, probes=2, on_nan="skip", in_turn=in_turn
    )
    pool = ExamplePool(Broken(), Named(10), "train", settings.pool, settings.reuse)
    grpo = GRPO(pool.vlm, pool, random_scorer(in_turn=in_turn), settings)
    logged = [metrics.values for metrics in grpo.train()]
    assert len(logged) == 6
    skipped = [values["skipped"] for values in logged]
    assert set(skipped) == {0, 1}
    assert all(math.isfinite(value) for values in logged for value in values.values())
    assert finite(grpo.scorer)


def test_a_number_that_is_bad_for_one_subset_alone_leaves_its_example_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With candidates, it may first show when the rest of the group is drawn."""
    calls = 0
    whole = FakeVLM.score

    def late(self: Any, encoded: Encoded, selection: torch.Tensor, *args: Any, **options: Any) -> Scores:
        nonlocal calls
        scores = whole(self, encoded, selection, *args, **options)
        if selection.shape[1] == 2:  # the rest of a group of four
            calls += 1
            if calls % 2 == 0:
                scores.log_likelihood[1, 1] = math.nan
        return scores

    monkeypatch.setattr(FakeVLM, "score", late)
    settings = config(pool=10, instances=4, warmup_steps=0, steps=4, candidates=2, probes=2, on_nan="skip")
    pool = ExamplePool(FakeVLM(), Named(10), "train", settings.pool, settings.reuse)
    grpo = GRPO(pool.vlm, pool, random_scorer(), settings)
    logged = [metrics.values for metrics in grpo.train()]
    assert sum(values["skipped"] for values in logged) >= 2
    assert finite(grpo.scorer)


def test_a_batch_with_nothing_left_takes_no_step() -> None:
    class Nothing(FakeVLM):
        def score(self, encoded: Encoded, *args: Any, **options: Any) -> Scores:
            scores = super().score(encoded, *args, **options)
            scores.log_likelihood[:] = math.nan
            return scores

    settings = config(pool=10, instances=4, warmup_steps=0, on_nan="skip")
    pool = ExamplePool(Nothing(), Named(10), "train", settings.pool, settings.reuse)
    scorer = Scorer(SMALL)
    before = {key: value.clone() for key, value in scorer.state_dict().items()}
    assert list(GRPO(pool.vlm, pool, scorer, settings).train()) == []
    assert all(torch.equal(before[key], value) for key, value in scorer.state_dict().items())


def test_imitation_names_the_example_or_leaves_it_out() -> None:
    def bad_teacher(vlm: Any, encoded: Encoded, compute: Any = None) -> torch.Tensor:
        found = encoded.relevance()
        assert found is not None
        found[Broken()._bad(encoded)] = math.nan
        return found

    for on_nan in ("stop", "skip"):
        options = ImitationConfig(steps=6, instances=4, pool=10, teacher="relevance", on_nan=on_nan)  # type: ignore[arg-type]
        pool = ExamplePool(FakeVLM(), Named(10), "train", 10, 4)
        imitation = Imitation(pool.vlm, pool, Scorer(SMALL), options)
        imitation.teacher = bad_teacher
        if on_nan == "stop":
            with pytest.raises(
                NonFiniteError, match=rf"imitation step \d: the teacher's score of example 'train {BAD}'"
            ):
                list(imitation.train())
        else:
            logged = [metrics.values for metrics in imitation.train()]
            assert {values["skipped"] for values in logged} == {0, 1}
            assert all(math.isfinite(values["loss"]) for values in logged)
        assert finite(imitation.scorer)


def test_relaxations_name_the_example_or_leave_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(vlm: Any, encoded: Encoded, gates: torch.Tensor) -> torch.Tensor:
        found = fake_likelihood(vlm, encoded, gates)
        return torch.where(Broken()._bad(encoded)[:, None], math.nan, found)

    monkeypatch.setattr(relaxed, "check_gates", lambda vlm: vlm)
    monkeypatch.setattr(relaxed, "gated_log_likelihood", broken)
    for on_nan in ("stop", "skip"):
        options = SoftTopKConfig(steps=6, instances=4, pool=10, warmup_steps=0, on_nan=on_nan)  # type: ignore[arg-type]
        pool = ExamplePool(FakeVLM(), Named(10), "train", 10, 4)
        relaxation = SoftTopK(pool.vlm, pool, Scorer(SMALL), options)
        if on_nan == "stop":
            with pytest.raises(NonFiniteError, match=rf"step \d: the answer's log-likelihood of example 'train {BAD}'"):
                list(relaxation.train())
        else:
            assert {metrics.values["skipped"] for metrics in relaxation.train()} == {0, 1}
        assert finite(relaxation.scorer)


class Blind(FakeVLM):
    """Encodes one image as NaN."""

    part = "tokens"

    def encode(self, examples: Any) -> Encoded:
        encoded = super().encode(examples)
        getattr(encoded, self.part)[Broken()._bad(encoded)] = math.nan
        return encoded


@pytest.mark.parametrize("part", ["tokens", "question"])
@pytest.mark.parametrize("kind", ["grpo", "candidates", "imitation", "soft"])
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_an_image_encoded_as_nan_is_named_or_left_out(
    kind: str, on_nan: Any, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaxed, "check_gates", lambda vlm: vlm)
    monkeypatch.setattr(relaxed, "gated_log_likelihood", fake_likelihood)
    monkeypatch.setattr(Blind, "part", part)
    shared: dict[str, Any] = {"pool": 10, "instances": 4, "steps": 6, "on_nan": on_nan, "teacher": "relevance"}
    pool, scorer = ExamplePool(Blind(), Named(10), "train", 10, 4), random_scorer()
    training: Any = {
        "grpo": lambda: GRPO(pool.vlm, pool, scorer, config(**shared, warmup_steps=0)),
        "candidates": lambda: GRPO(pool.vlm, pool, scorer, config(**shared, candidates=2, probes=2, warmup_steps=2)),
        "imitation": lambda: Imitation(pool.vlm, pool, scorer, ImitationConfig(**shared)),
        "soft": lambda: SoftTopK(pool.vlm, pool, scorer, SoftTopKConfig(**shared, warmup_steps=2)),
    }[kind]()
    what = "a visual token" if part == "tokens" else "an embedding of the question"
    if on_nan == "stop":
        with pytest.raises(NonFiniteError, match=rf"step \d: {what} of example 'train {BAD}' is NaN or infinite"):
            list(training.train())
    else:
        logged = [metrics.values for metrics in training.train()]
        assert {values["skipped"] for values in logged} == {0, 1}
        assert all(math.isfinite(value) for values in logged for value in values.values())
    assert finite(scorer)


@pytest.mark.parametrize("options", [{"learning_rate": 1e30}, {"warmup_steps": 4, "warmup_learning_rate": 1e30}])
def test_a_learning_rate_that_ruins_the_scorer_is_named_in_every_phase(options: dict[str, Any]) -> None:
    with pytest.raises(NonFiniteError, match=r"(grpo|warmup) step \d: .*learning rate"):
        list(trainer(**options).train())


def test_a_learning_rate_that_blows_up_is_named_and_nothing_of_it_is_saved(tmp_path: Path) -> None:
    grpo = trainer(learning_rate=1e30, on_nan="skip", instances=3)
    grpo.scorer.save(tmp_path)
    saved = (tmp_path / "scorer.safetensors").read_bytes()
    with pytest.raises(NonFiniteError, match=r"grpo step \d"):
        list(grpo.train())
    with torch.no_grad():
        next(grpo.scorer.parameters())[:] = math.nan
    with pytest.raises(NonFiniteError, match="has NaN or infinite numbers"):
        grpo.scorer.save(tmp_path)
    assert (tmp_path / "scorer.safetensors").read_bytes() == saved


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_no_step_is_taken_down_a_gradient_that_is_none(loss: float) -> None:
    network = torch.nn.Linear(2, 1)
    before = network.weight.detach().clone()
    learner = Learner(network, 0.1, 1.0)
    with pytest.raises(NonFiniteError, match=r"try a learning rate below 0\.1"):
        learner.minimise(network(torch.ones(1, 2)).sum() * loss)
    assert torch.equal(network.weight, before)
    learner.minimise(network(torch.ones(1, 2)).sum())
    assert not torch.equal(network.weight, before)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_laws_over_subsets_refuse_what_is_no_number(number: float) -> None:
    scores = torch.zeros(2, 6)
    scores[1, 2] = number
    mask, k, pairs = torch.ones(2, 6, dtype=torch.bool), torch.tensor([2, 3]), torch.zeros(2, 6, 6)
    with pytest.raises(ValueError, match="finite"):
        OrderedSubset(scores, pairs, k, mask)
    if number == -math.inf:  # which masks a token there
        assert not KSubset(scores, k, mask).mode[1, 2]
    else:
        with pytest.raises(ValueError, match="every score must be finite, or -inf"):
            KSubset(scores, k, mask)
    bad = pairs.clone()
    bad[0, 1, 2] = number
    with pytest.raises(ValueError, match="finite"):
        OrderedSubset(torch.zeros(2, 6), bad, k, mask)
    mask[1, 2] = False  # what is no token may have any score
    law = OrderedSubset(scores, pairs, k, mask)
    assert law.mode.sum(1).tolist() == [2, 3]


def test_choosing_by_scores_that_are_nan_is_refused() -> None:
    scores = torch.tensor([[1.0, math.nan, 2.0]])
    with pytest.raises(ValueError, match="got NaN for 1 tokens"):
        top_k(scores, torch.tensor([1]), torch.ones(1, 3, dtype=torch.bool))
    observation = {"token_mask": np.array([1, 1, 0]), "budget": np.array([0.5])}
    with pytest.raises(ValueError, match="got NaN for 1 tokens"):
        keep_best(np.array([1.0, np.nan, 2.0]), observation)
    assert keep_best(np.array([-np.inf, np.inf, np.nan]), observation).tolist() == [False, True, False]
    scorer = random_scorer()
    encoded = encode(2)
    with torch.no_grad():
        scorer.out[1].weight[:] = math.nan
    with pytest.raises(NonFiniteError, match="scores of the scorer are NaN or infinite"):
        ScorerSelector(scorer)(FakeVLM(), encoded, torch.tensor([2, 2]), torch.Generator())


class Never(FakeVLM):
    """Gives NaN for one example of every split."""

    def score(self, encoded: Encoded, *args: Any, **options: Any) -> Scores:
        scores = super().score(encoded, *args, **options)
        bad = [example.key.endswith(f" {BAD}") for example in encoded.examples]
        scores.log_likelihood[torch.tensor(bad)] = math.nan
        return scores


def test_comparisons_name_the_example_and_the_method() -> None:
    from grip_env.reports.comparison import compare

    with pytest.raises(NonFiniteError, match=rf"log-likelihood of example 'test {BAD}' under .* is NaN or infinite"):
        compare(Never(), Named(10), {"random": BASELINES["random"]}, "test", 10, (0.5,), progress=False)


def test_rewards_that_are_no_numbers_name_an_example_in_environments_and_searches() -> None:
    env = grip_env.TokenSelectionEnv(vlm=Never(), task=Named(10), split="test", budget=0.5)
    env.reset(options={"index": BAD})
    with pytest.raises(NonFiniteError, match=rf"1 of 1 selections, of example 'test {BAD}' among others"):
        env.step(env.action_space.sample())
    encoded = Never().encode([Named(10).example("test", index) for index in (1, BAD)])
    with pytest.raises(NonFiniteError, match=rf"a selection of example 'test {BAD}' is not finite"):
        RandomSearch(4)(Never(), encoded, torch.tensor([2, 2]), torch.Generator().manual_seed(0))
