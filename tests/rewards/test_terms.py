"""Rewards by hand and through the raw model; their arithmetic; what they are called; who asks the model for what."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from agents.grpo import GRPO, GRPOConfig
from agents.pool import ExamplePool
from agents.scorer import Scorer, ScorerConfig
from grip_env.envs.selection import TokenSelectionEnv, TokenSelectionVectorEnv
from grip_env.rewards.parsing import resolve_reward
from grip_env.rewards.terms import (
    REWARDS,
    AgreementWithFull,
    AnswerLogLikelihood,
    AnswerProbability,
    ComposableReward,
    ExactMatch,
    KeptFraction,
    Reward,
    WeightedSum,
    needs_agreement,
)
from grip_env.tasks.base import Example
from grip_env.vlms import TINY, load_vlm
from grip_env.vlms.base import Encoded, Scores
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fakes import VOCABULARY, WIDTH, FakeTask, FakeVLM, expected_first_token, indices

LIKELIHOOD, KEPT, AGREEMENT = [[-0.5, -2.0], [-1.0, -0.1]], [[0.25, 0.5], [1.0, 0.0]], [[-0.125, 0.0], [-3.0, -0.5]]


@pytest.fixture
def scores() -> Scores:
    correct = torch.tensor([[True, False], [False, True]])
    return Scores(torch.tensor(LIKELIHOOD), correct, torch.tensor(KEPT), agreement=torch.tensor(AGREEMENT))


@pytest.fixture
def full() -> Scores:
    return Scores(torch.tensor([[-0.5], [-0.25]]), torch.tensor([[True], [True]]), torch.ones(2, 1))


@pytest.fixture(scope="module")
def tiny() -> HuggingFaceVLM:
    return load_vlm("tiny")


def twice_the_kept(scores: Scores, full: Scores) -> torch.Tensor:
    return 2 * scores.kept


def divergence(reference: Any, other: Any) -> float:
    """KL of two vectors of logits, in float64 and through probabilities."""
    p, q = (np.exp(np.asarray(logits, np.float64)) for logits in (reference, other))
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0))


# -- each reward by itself -------------------------------------------------------------------------------


def test_log_likelihood_is_measured_from_the_full_image(scores: Scores, full: Scores) -> None:
    reward = REWARDS["log_likelihood"]()(scores, full)
    torch.testing.assert_close(reward, torch.tensor([[0.0, -1.5], [-0.75, 0.15]]))


def test_probability_is_that_of_one_answer_token(scores: Scores, full: Scores) -> None:
    reward = REWARDS["probability"]()(scores, full)
    expected = [[math.exp(-0.5), math.exp(-2.0)], [math.exp(-1.0), math.exp(-0.1)]]
    torch.testing.assert_close(reward, torch.tensor(expected))


def test_exact_match_is_one_or_zero(scores: Scores, full: Scores) -> None:
    reward = REWARDS["exact_match"]()(scores, full)
    assert reward.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_agreement_and_kept_fraction_are_those_of_the_scores(scores: Scores, full: Scores) -> None:
    assert REWARDS["agreement"]()(scores, full).tolist() == AGREEMENT
    assert REWARDS["kept_fraction"]()(scores, full).tolist() == KEPT


@pytest.mark.parametrize("name", REWARDS)
def test_every_registered_reward_keeps_shape_and_is_a_float(name: str, scores: Scores, full: Scores) -> None:
    reward = resolve_reward(name)
    assert isinstance(reward, Reward)
    value = reward(scores, full)
    assert value.shape == (2, 2)
    assert value.is_floating_point()
    assert value.isfinite().all()


def test_only_agreement_has_needs() -> None:
    assert [name for name in REWARDS if needs_agreement(REWARDS[name]())] == ["agreement"]
    assert not needs_agreement(twice_the_kept)


def test_agreement_that_was_not_computed_is_refused_with_the_call_that_does(scores: Scores, full: Scores) -> None:
    without = dataclasses.replace(scores, agreement=None)
    with pytest.raises(ValueError, match=r"reference=full\.first_token.*first_token=True"):
        (AnswerLogLikelihood() + AgreementWithFull())(without, full)


# -- agreement through the raw model ---------------------------------------------------------------------

SIZES = (0, 1, 7, 40, 143)


def subsets(encoded: Encoded, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> torch.Tensor:
    """Random selections of the given sizes, bool (B, len(sizes), N)."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(len(encoded), len(sizes), encoded.token_mask.shape[1], generator=generator).argsort(-1)
    return rank.argsort(-1) < torch.tensor(sizes)[:, None]


def agreement(vlm: Any, encoded: Encoded, selection: torch.Tensor) -> torch.Tensor:
    full = vlm.score(encoded, encoded.full_selection(), first_token=True)
    return AgreementWithFull()(vlm.score(encoded, selection, reference=full.first_token), full)


def test_agreement_is_the_divergence_of_the_raw_models_next_token(
    tiny: HuggingFaceVLM, scene_examples: list[Example]
) -> None:
    processor = AutoProcessor.from_pretrained(TINY, backend="pil")

    def logits(example: Example, keep: torch.Tensor) -> Any:
        """What the model says after the prompt, all tokens in place and those dropped hidden from attention."""
        text = tiny.prompt(example.question)
        inputs = processor(images=example.image, text=text, return_tensors="pt", add_special_tokens=False)
        mask = torch.ones_like(inputs["input_ids"])
        mask[inputs["input_ids"] == tiny.model.config.image_token_id] = keep.long()
        places = torch.arange(mask.shape[1])[None]
        with torch.no_grad():
            out = tiny.model(**inputs | {"attention_mask": mask, "position_ids": places}, use_cache=False)
        return out.logits[0, -1].numpy()

    encoded = tiny.encode(scene_examples)
    selection = subsets(encoded)
    found = agreement(tiny, encoded, selection)
    assert found.dtype == torch.float32
    for row, example in enumerate(scene_examples):
        reference = logits(example, torch.ones(144))
        expected = [-divergence(reference, logits(example, keep)) for keep in selection[row]]
        np.testing.assert_allclose(found[row], expected, atol=1e-5, rtol=1e-5)
    assert (found <= 0).all()
    assert (found[:, 0] < -0.1).any(), "dropping tokens must matter, or this shows nothing"


def test_agreement_is_nothing_with_all_tokens_and_never_above(
    tiny: HuggingFaceVLM, scene_examples: list[Example]
) -> None:
    encoded = tiny.encode(scene_examples)
    torch.testing.assert_close(agreement(tiny, encoded, encoded.full_selection()), torch.zeros(6, 1), atol=1e-6, rtol=0)
    assert (agreement(tiny, encoded, subsets(encoded, (140,) * 8, seed=1)) <= 0).all()


def test_agreement_knows_no_answer(tiny: HuggingFaceVLM, scene_examples: list[Example]) -> None:
    """Answers of other words, lengths and truth leave it where it is, while they move the log-likelihood."""
    encoded = tiny.encode(scene_examples)
    selection = subsets(encoded)
    expected, scores = agreement(tiny, encoded, selection), tiny.score(encoded, selection)
    for answer in ("left", "red circle or 7"):
        other = tiny.encode([dataclasses.replace(example, answer=answer) for example in scene_examples])
        torch.testing.assert_close(agreement(tiny, other, selection), expected, atol=1e-5, rtol=0)
        moved = (tiny.score(other, selection).log_likelihood - scores.log_likelihood).abs()
        assert moved.max() > 0.5


def test_first_token_and_log_likelihood_are_of_one_distribution(
    tiny: HuggingFaceVLM, scene_examples: list[Example]
) -> None:
    """For an answer of one token, its log-likelihood is its entry."""
    encoded = tiny.encode(scene_examples)
    assert encoded.answer_lengths.tolist() == [1] * 6
    selection = subsets(encoded)
    scores = tiny.score(encoded, selection, first_token=True)
    assert scores.first_token is not None
    assert scores.first_token.shape == (6, len(SIZES), tiny.model.config.text_config.vocab_size)
    torch.testing.assert_close(scores.first_token.exp().sum(-1), torch.ones(6, len(SIZES)))
    ids = torch.tensor([int(row[length - 1]) for row, length in zip(encoded.input_ids, encoded.lengths, strict=True)])
    chosen = scores.first_token.gather(2, ids[:, None, None].expand(-1, len(SIZES), 1))[..., 0]
    torch.testing.assert_close(chosen, scores.log_likelihood)


def test_every_score_is_the_same_whatever_else_is_in_the_batch(
    tiny: HuggingFaceVLM, scene_examples: list[Example]
) -> None:
    examples = [dataclasses.replace(scene_examples[row], answer="red circle" if row == 2 else "no") for row in range(5)]
    encoded = tiny.encode(examples)
    selection = subsets(encoded)
    full = tiny.score(encoded, encoded.full_selection(), first_token=True)
    together = tiny.score(encoded, selection, reference=full.first_token)
    expected = {name: getattr(together, name) for name in ("log_likelihood", "kept", "agreement")}
    found = []
    for budget in (1, 400):
        other = HuggingFaceVLM(tiny.model, tiny.processor, token_budget=budget)
        whole = other.score(encoded, encoded.full_selection(), first_token=True)
        found.append(other.score(encoded, selection, reference=whole.first_token))
    alone = []
    for row, example in enumerate(examples):
        one = tiny.encode([example])
        whole = tiny.score(one, one.full_selection(), first_token=True)
        alone.append(tiny.score(one, selection[row : row + 1], reference=whole.first_token))
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = tiny.score(encoded, selection[:, order], reference=full.first_token)
    for name, value in expected.items():
        for other_scores in (*found, Scores.concatenate(alone)):
            torch.testing.assert_close(getattr(other_scores, name), value, atol=1e-4, rtol=0)
        torch.testing.assert_close(getattr(permuted, name), value[:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(together.kept, torch.tensor(SIZES).expand(5, -1) / 144)
    assert together.first_token is None
    assert full.agreement is None


def test_a_reference_of_another_batch_is_refused_with_both_shapes(
    tiny: HuggingFaceVLM, scene_examples: list[Example]
) -> None:
    encoded = tiny.encode(scene_examples[:2])
    reference = tiny.score(encoded, encoded.full_selection(), first_token=True).first_token
    assert reference is not None
    for wrong in (reference[:1], reference[:, 0], reference.expand(-1, 3, -1)):
        with pytest.raises(ValueError, match=r"shape \(2, 1, vocabulary\); got \([\d, ]+\): give first_token"):
            tiny.score(encoded, subsets(encoded), reference=wrong)


def test_the_model_holds_no_distribution_of_every_selection(
    tiny: HuggingFaceVLM, scene_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared at a time are the selections of one call of the model."""
    encoded = tiny.encode(scene_examples)
    full = tiny.score(encoded, encoded.full_selection(), first_token=True)
    shapes: list[tuple[int, ...]] = []
    from grip_env.vlms import scoring

    compare = scoring.negative_divergence

    def recorded(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(other.shape))
        return compare(reference, other)

    monkeypatch.setattr(scoring, "negative_divergence", recorded)
    few = HuggingFaceVLM(tiny.model, tiny.processor, token_budget=200)
    few.score(encoded, subsets(encoded), reference=full.first_token)
    assert sum(rows for rows, _ in shapes) == 6 * len(SIZES)
    assert max(rows for rows, _ in shapes) <= 200 / min(encoded.lengths - 144)


def test_kept_counts_real_tokens_alone() -> None:
    task = FakeTask()
    examples = [task.example("train", index) for index in range(3)]
    counts = dict(zip((example.key for example in examples), (16, 10, 4), strict=True))
    encoded = FakeVLM(count=lambda example: counts[example.key]).encode(examples)
    selection = torch.ones(3, 2, 16, dtype=torch.bool)
    selection[:, 1, ::2] = False
    assert encoded.kept_fraction(selection).tolist() == [[1.0, 0.5]] * 3
    selection[:, 0, 1:] = False
    torch.testing.assert_close(encoded.kept_fraction(selection)[:, 0], 1 / torch.tensor([16.0, 10.0, 4.0]))


# -- scores ----------------------------------------------------------------------------------------------


def test_scores_are_cut_and_joined_with_all_their_fields() -> None:
    first = torch.rand(4, 1, VOCABULARY).log_softmax(-1)
    whole = Scores(torch.rand(4, 1), torch.rand(4, 1) > 0.5, torch.rand(4, 1), first)
    joined = Scores.concatenate([whole[2:], whole[torch.tensor([1, 0])]])
    for name in ("log_likelihood", "correct", "kept", "first_token"):
        assert getattr(joined, name).equal(getattr(whole, name)[[2, 3, 1, 0]])
    assert joined.agreement is None
    some = Scores.concatenate([whole, dataclasses.replace(whole, first_token=None)])
    assert some.first_token is None
    assert len(some.kept) == 8
    half = dataclasses.replace(whole, log_likelihood=whole.log_likelihood.bfloat16()).cpu()
    assert (half.log_likelihood.dtype, half.correct.dtype) == (torch.float32, torch.bool)


# -- arithmetic ------------------------------------------------------------------------------------------

LL, K, AG = AnswerLogLikelihood(), KeptFraction(), AgreementWithFull()


@pytest.mark.parametrize(
    ("reward", "shown", "value"),
    [
        (LL - 0.1 * K, "AnswerLogLikelihood() - 0.1 * KeptFraction()", lambda ll, k, ag: ll - 0.1 * k),
        (LL + K, "AnswerLogLikelihood() + KeptFraction()", lambda ll, k, ag: ll + k),
        (-LL, "-AnswerLogLikelihood()", lambda ll, k, ag: -ll),
        (K * 2 - 3, "2 * KeptFraction() - 3", lambda ll, k, ag: 2 * k - 3),
        (1 - K, "-KeptFraction() + 1", lambda ll, k, ag: 1 - k),
        (K / 4, "0.25 * KeptFraction()", lambda ll, k, ag: k / 4),
        (-(LL - K) / 2, "-0.5 * AnswerLogLikelihood() + 0.5 * KeptFraction()", lambda ll, k, ag: (k - ll) / 2),
        (
            LL - (AG - 2 * (K - 1)) + 0.5,
            "AnswerLogLikelihood() - AgreementWithFull() + 2 * KeptFraction() - 1.5",
            lambda ll, k, ag: ll - (ag - 2 * (k - 1)) + 0.5,
        ),
        (
            sum([LL, K, AG]),
            "AnswerLogLikelihood() + KeptFraction() + AgreementWithFull()",
            lambda ll, k, ag: ll + k + ag,
        ),
        (np.float32(0.5) * K, "0.5 * KeptFraction()", lambda ll, k, ag: k / 2),
        (np.float64(0.5) + K, "KeptFraction() + 0.5", lambda ll, k, ag: k + 0.5),
        (LL - twice_the_kept, "AnswerLogLikelihood() - twice_the_kept", lambda ll, k, ag: ll - 2 * k),
        (
            WeightedSum(((2.0, LL + K),)) + K,
            "2 * (AnswerLogLikelihood() + KeptFraction()) + KeptFraction()",
            lambda ll, k, ag: 2 * ll + 3 * k,
        ),
    ],
)
def test_arithmetic_of_rewards_is_that_of_their_values(
    reward: Any, shown: str, value: Any, scores: Scores, full: Scores
) -> None:
    assert repr(reward) == shown
    assert isinstance(reward, ComposableReward)
    parts = (torch.tensor(LIKELIHOOD) - full.log_likelihood, torch.tensor(KEPT), torch.tensor(AGREEMENT))
    torch.testing.assert_close(reward(scores, full), value(*parts))


def test_operands_are_left_as_they_were() -> None:
    whole = LL - 0.1 * K
    before = copy.deepcopy(whole)
    assert whole + AG != whole
    assert 2 * whole - whole != whole
    assert whole == before


def test_equal_rewards_are_equal_in_any_order() -> None:
    assert LL - K / 10 == AnswerLogLikelihood() - 0.1 * KeptFraction() == -(0.1 * K) + LL == LL - (K - 1) * 0.1 - 0.1
    assert hash(LL - 0.1 * K) == hash(-0.1 * K + LL)
    different = [LL, K, LL - K, LL + K, LL - 0.1 * K, LL + 1, 2 * LL, -LL, LL + LL, LL + twice_the_kept]
    assert len(set(different)) == len(different)
    assert all((one == other) == (one is other) for one in different for other in different)
    assert LL - K != "LL - K"


def test_arithmetic_that_does_nothing_gives_the_reward_itself() -> None:
    for same in (1 * LL, LL + 0, LL / 1, -(-1 * LL), 2 * LL / 2, sum([LL]), LL + 1 - 1):
        assert same == LL
        assert type(same) is AnswerLogLikelihood


@pytest.mark.parametrize("copied", [lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy, copy.copy])
@pytest.mark.parametrize("reward", [LL, AG, K, LL - 0.1 * K + 3, (AG + twice_the_kept) / 2])
def test_rewards_can_be_copied_and_pickled(reward: Any, copied: Any, scores: Scores, full: Scores) -> None:
    again = copied(reward)
    assert again == reward
    assert repr(again) == repr(reward)
    assert needs_agreement(again) == needs_agreement(reward)
    assert again(scores, full).equal(reward(scores, full))


def test_plain_callables_join_in_from_either_side(scores: Scores, full: Scores) -> None:
    for reward in (twice_the_kept + LL, LL + twice_the_kept):
        assert reward == LL + twice_the_kept
        torch.testing.assert_close(reward(scores, full), LL(scores, full) + 2 * scores.kept)
    torch.testing.assert_close((twice_the_kept - LL)(scores, full), 2 * scores.kept - LL(scores, full))
    weighed = WeightedSum(((0.5, twice_the_kept),))
    torch.testing.assert_close((LL - weighed)(scores, full), LL(scores, full) - scores.kept)
    assert "<lambda>" in repr(LL + (lambda scores, full: scores.kept))
    assert torch.equal((ExactMatch() - (lambda scores, full: scores.correct))(scores, full), torch.zeros(2, 2))


def test_a_sum_needs_what_any_term_needs() -> None:
    def own(scores: Scores, full: Scores) -> torch.Tensor:
        assert scores.agreement is not None
        return scores.agreement.exp()

    assert needs_agreement(LL - 0.1 * AG)
    assert needs_agreement(-AG)
    assert not needs_agreement(LL - K)
    assert not needs_agreement(LL + own)
    own.needs_agreement = True  # type: ignore[attr-defined]
    assert needs_agreement(own)
    assert needs_agreement(LL + own)


def test_rewards_of_ones_own_get_the_arithmetic_by_inheritance(scores: Scores, full: Scores) -> None:
    class Squared(ComposableReward):
        def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
            return scores.kept**2

    reward = 3 * Squared() - LL
    torch.testing.assert_close(reward(scores, full), 3 * scores.kept**2 - LL(scores, full))
    assert not needs_agreement(reward)


@pytest.mark.parametrize(
    ("attempt", "kind", "message"),
    [
        (lambda: LL * K, TypeError, r"multiplied by a number, and not by KeptFraction\(\).*write a callable"),
        (lambda: LL / K, TypeError, r"divided by a number, and not by KeptFraction\(\)"),
        (lambda: twice_the_kept * LL, TypeError, "multiplied by a number, and not by <function twice_the_kept"),
        (lambda: LL * np.ones(2), TypeError, "multiplied by a number, and not by array"),
        (lambda: LL + KeptFraction, TypeError, "got <class .*KeptFraction"),  # parentheses forgotten
        (lambda: LL + "kept_fraction", TypeError, "got 'kept_fraction'"),
        (lambda: 1 / LL, TypeError, "unsupported operand"),
        (lambda: LL / 0, ZeroDivisionError, "zero"),
        (lambda: LL * math.inf, ValueError, r"must be finite; got \[0.0, inf\]|must be finite; got \[nan, inf\]"),
        (lambda: LL + math.nan, ValueError, "must be finite"),
        (lambda: WeightedSum(()), ValueError, "at least one term"),
        (lambda: WeightedSum(((1.0, 3),)), TypeError, "got 3"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_arithmetic_of_rewards_is_refused(attempt: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        attempt()


# -- rewards as text -------------------------------------------------------------------------------------


def test_rewards_resolve_to_themselves_and_functions_are_rewards(scores: Scores, full: Scores) -> None:
    own = ExactMatch()
    assert resolve_reward(own) is own
    assert resolve_reward("log_likelihood") == AnswerLogLikelihood()

    def twice(scores: Scores, full: Scores) -> torch.Tensor:
        return 2 * scores.log_likelihood

    assert resolve_reward(twice) is twice
    torch.testing.assert_close(resolve_reward(twice)(scores, full), 2 * scores.log_likelihood)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("log_likelihood - 0.1 * kept_fraction", LL - 0.1 * K),
        (" agreement ", AG),
        ("(log_likelihood+agreement)/2 - (-1)", (LL + AG) / 2 + 1),
        ("+probability * 1e-1", 0.1 * AnswerProbability()),
        ("-exact_match", -ExactMatch()),
        ("2 * (3 - 1) * agreement", 4 * AG),
        ("(agreement)", AG),
    ],
)
def test_sums_of_names_are_read(text: str, expected: Reward) -> None:
    assert resolve_reward(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("kl", "there is no reward 'kl'"),
        ("", "invalid syntax"),
        ("log-likelihood", "there is no reward 'log'"),
        ("agreement +", "invalid syntax"),
        ("agreement 2", "invalid syntax"),
        ("0.1", "it names no reward"),
        ("2 - 1", "it names no reward"),
        ("agreement * agreement", "multiplied by a number"),
        ("1 / agreement", "unsupported operand"),
        ("agreement / (1 - 1)", "ZeroDivisionError"),
        ("1e999 * agreement", "must be finite"),
        (f"{10**400} * agreement", "OverflowError"),
        ("agreement ** 2", r"'agreement \*\* 2' is not a name"),
        ("agreement // 2", "is not a name"),
        ("True * agreement", "'True' is not a name"),
        ("2j * agreement", "is not a name"),
        ("'agreement'", "is not a name"),
        ("agreement()", "is not a name"),
        ("agreement.needs_agreement", "is not a name"),
        ("agreement if 1 else agreement", "is not a name"),
        ("not agreement", "is not a name"),
        ("[agreement][0]", "is not a name"),
        ("__import__('os').getcwd()", "is not a name"),
        ("__builtins__", "there is no reward '__builtins__'"),
        ("agreement\nagreement", "invalid syntax"),
        ("agreement\0", "null"),
        ("(" * 240 + "agreement" + ")" * 240, "parentheses|nested|Error"),
        ("-" * 600 + "agreement", "609 characters"),
        ("no_such_module:reward", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("grip_env.rewards.terms:Nothing", "AttributeError.*'Nothing'"),
        ("math:pi", r"got 3\.14"),
        ("grip_env.rewards.terms:ComposableReward", "abstract"),
        ("a b:c", "invalid format"),
        (":", "."),
    ],
)
def test_other_texts_are_refused_in_one_line_with_the_names_and_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        resolve_reward(text)
    message = str(refusal.value)
    assert message.startswith(f"cannot read the reward {text!r} (")
    assert ", ".join(REWARDS) in message
    assert "'log_likelihood - 0.1 * kept_fraction'" in message
    assert "'package.module:object'" in message
    assert "\n" not in message


def test_what_is_no_reward_is_refused() -> None:
    with pytest.raises(TypeError, match="got 3"):
        resolve_reward(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ExactMatch"):  # a class that was not instantiated
        resolve_reward(ExactMatch)  # type: ignore[arg-type]


MODULE = """
from grip_env.envs.rewards import AnswerLogLikelihood, KeptFraction

ready = AnswerLogLikelihood() - 0.1 * KeptFraction()

def plain(scores, full):
    return 2 * scores.kept

def make(weight=0.1):
    return AnswerLogLikelihood() - weight * KeptFraction()

class Half:
    needs_agreement = True

    def __call__(self, scores, full):
        return scores.kept / 2

class Box:
    inner = ready

def fails():
    raise RuntimeError("no such\\nluck")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The importable name of a user's module."""
    (tmp_path / "rewards_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "rewards_of_a_user"


def test_rewards_are_imported_by_place(module: str, scores: Scores, full: Scores) -> None:
    for place in ("ready", "make", "Box.inner"):
        assert resolve_reward(f"{module}:{place}") == LL - 0.1 * K
    plain, half = resolve_reward(f"{module}:plain"), resolve_reward(f"{module}:Half")
    assert plain(scores, full).equal(2 * scores.kept)
    assert half(scores, full).equal(scores.kept / 2)
    assert needs_agreement(half)
    with pytest.raises(ValueError, match=r"\(RuntimeError: no such luck\): give one of"):
        resolve_reward(f"{module}:fails")


# -- in the environments ---------------------------------------------------------------------------------

TEXTS = ("log_likelihood", "probability", "exact_match", "agreement", "kept_fraction")
COMPOSED = "2 * log_likelihood - probability / 4 + 0.5 * exact_match + agreement - 0.1 * kept_fraction + 3"


def composed(ll: Any, probability: Any, match: Any, agreement: Any, kept: Any) -> Any:
    return 2 * ll - probability / 4 + 0.5 * match + agreement - 0.1 * kept + 3


class WatchedVLM(FakeVLM):
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, bool, bool]] = []

    def score(self, encoded: Encoded, selection: torch.Tensor, *arguments: Any, **options: Any) -> Scores:
        scores = super().score(encoded, selection, *arguments, **options)
        self.asked.append((selection.shape[1], scores.first_token is not None, scores.agreement is not None))
        return scores


def single_rewards(reward: Any, vlm: Any = None, episodes: int = 12, **arguments: Any) -> list[float]:
    defaults: dict[str, Any] = {"vlm": vlm or FakeVLM(), "task": FakeTask(), "budget": (0.06, 1.0)}
    env = TokenSelectionEnv(reward=reward, **(defaults | arguments))
    env.reset(seed=3)
    actions, paid = np.random.default_rng(0), []
    for _ in range(episodes):
        paid.append(env.step(actions.integers(0, 2, env.rules.max_tokens).astype(np.int8))[1])
        env.reset()
    return paid


def vector_rewards(reward: Any, steps: int = 4, **arguments: Any) -> np.ndarray:
    defaults: dict[str, Any] = {"vlm": FakeVLM(), "task": FakeTask(), "budget": (0.06, 1.0)}
    env = TokenSelectionVectorEnv(3, reward=reward, **(defaults | arguments))
    env.reset(seed=3)
    actions = np.random.default_rng(0)
    return np.stack([env.step(actions.integers(0, 2, (3, 16)).astype(np.int8))[1] for _ in range(steps)])


@pytest.mark.parametrize("run", [single_rewards, vector_rewards])
@pytest.mark.parametrize("arguments", [{}, {"cache_size": 0, "over_budget_penalty": 0.0}])
def test_composed_reward_pays_the_arithmetic_of_single_rewards(run: Any, arguments: dict[str, Any]) -> None:
    parts = [np.array(run(text, **arguments)) for text in TEXTS]
    assert all(part.std() > 0.01 for part in parts)
    for whole in (COMPOSED, resolve_reward(COMPOSED), composed(*(resolve_reward(text) for text in TEXTS))):
        np.testing.assert_allclose(run(whole, **arguments), composed(*parts), atol=1e-5)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_vector_and_single_environments_pay_alike(number: int) -> None:
    env = TokenSelectionEnv(FakeVLM(), FakeTask(), budget=(0.06, 1.0), reward=COMPOSED)
    env.reset(seed=3 + number)
    actions, expected = np.random.default_rng(0), []
    for _ in range(4):
        expected.append(env.step(actions.integers(0, 2, (3, 16)).astype(np.int8)[number])[1])
        env.reset()
    np.testing.assert_allclose(vector_rewards(COMPOSED)[:, number], expected, atol=1e-6)


def test_environments_pay_the_divergence_of_what_was_kept() -> None:
    """In both environments, also where most episodes end before others of the same example begin."""
    env = TokenSelectionEnv(FakeVLM(), FakeTask(3), budget=0.5, reward="agreement", cache_size=1)
    actions = np.random.default_rng(1)
    _, _ = env.reset(seed=0)
    whole = expected_first_token(torch.ones(16, dtype=torch.bool))
    for _ in range(6):
        _, reward, _, _, info = env.step(actions.integers(0, 2, 16).astype(np.int8))
        kept = torch.zeros(16, dtype=torch.bool)
        kept[indices(info["kept"])] = True
        assert reward == pytest.approx(-divergence(whole, expected_first_token(kept)), abs=1e-5)
        assert reward < -1e-3
        env.reset()
    envs = TokenSelectionVectorEnv(4, FakeVLM(), FakeTask(3), budget=0.5, reward="agreement", cache_size=1)
    envs.reset(seed=0)
    for _ in range(3):
        _, rewards, _, _, infos = envs.step(actions.integers(0, 2, (4, 16)).astype(np.int8))
        for reward, kept_tokens in zip(rewards, indices(infos["final_info"]["kept"]), strict=True):
            kept = torch.zeros(16, dtype=torch.bool)
            kept[kept_tokens] = True
            assert reward == pytest.approx(-divergence(whole, expected_first_token(kept)), abs=1e-5)


def test_environment_on_the_embedded_model_pays_the_composed_reward(tiny: HuggingFaceVLM) -> None:
    arguments = {"task": "scenes", "split": "validation", "budget": 0.1, "episodes": 3, "vlm": tiny}
    parts = [np.array(single_rewards(text, **arguments)) for text in TEXTS]
    np.testing.assert_allclose(single_rewards(COMPOSED, **arguments), composed(*parts), atol=1e-4)
    assert (parts[3] < 0).all()
    np.testing.assert_allclose(parts[4], 14 / 144, atol=1e-6)


@pytest.mark.parametrize("reward", ["log_likelihood - kept_fraction", "agreement"])
def test_a_step_calls_the_model_once_and_agreement_once_more(reward: str) -> None:
    vlm = WatchedVLM()
    envs = TokenSelectionVectorEnv(4, vlm, FakeTask(40), reward=reward)
    envs.reset(seed=0)
    envs.step(np.ones((4, 16), dtype=np.int8))
    # (selections of each, first token?, agreement?): the full images at first, then what was kept, then full images
    agreement = [(1, True, False), (1, False, True), (1, True, False)]
    assert vlm.asked == (agreement if reward == "agreement" else [(1, False, False)] * 2)


def test_plain_callables_see_scores_of_one_selection() -> None:
    seen: list[tuple[Scores, Scores]] = []

    def own(scores: Scores, full: Scores) -> torch.Tensor:
        seen.append((scores, full))
        return torch.full_like(scores.log_likelihood, -1.0)

    assert single_rewards(own, episodes=2) == [-1.0, -1.0]
    assert single_rewards(LL + own, episodes=3) == pytest.approx(np.array(single_rewards(LL, episodes=3)) - 1)
    for scores, full in seen:
        assert scores.kept.shape == full.kept.shape == (1, 1)
        assert full.kept.item() == 1.0
        assert scores.first_token is None
        assert scores.agreement is None


def test_what_stays_in_memory_of_an_example_is_its_own() -> None:
    """Scores made together are kept apart, or one example in the cache would keep a whole batch of distributions."""
    envs = TokenSelectionVectorEnv(8, vlm=FakeVLM(), task=FakeTask(40), reward="agreement")
    envs.reset(seed=0)
    instances = envs.rules.store.instances()
    assert len(instances) > 1
    for instance in instances:
        assert instance.full is not None
        assert instance.full.first_token is not None
        assert instance.full.first_token.shape == (1, 1, VOCABULARY)
        assert instance.full.first_token.untyped_storage().nbytes() == 4 * VOCABULARY


# -- in training -----------------------------------------------------------------------------------------


def grpo(vlm: Any, task: Any, width: int, reward: Any, **changes: Any) -> GRPO:
    settings: dict[str, Any] = {"steps": 2, "instances": 4, "group": 3, "warmup_steps": 1, "pool": 8, "reuse": 1}
    settings |= {"candidates": 1, "teacher": "relevance", "min_budget": 0.1}
    config = GRPOConfig(**(settings | changes))
    torch.manual_seed(0)
    scorer = Scorer(ScorerConfig(token_width=width, width=32, blocks=1, heads=2))
    return GRPO(vlm, ExamplePool(vlm, task, "train", config.pool, config.reuse), scorer, config, reward)


@pytest.mark.parametrize("reward", [*TEXTS, COMPOSED, twice_the_kept, LL + twice_the_kept])
def test_grpo_steps_with_every_reward_and_asks_for_no_more_than_it_needs(reward: Any) -> None:
    vlm = WatchedVLM()
    algorithm = grpo(vlm, FakeTask(40), WIDTH, reward)
    metrics = [one for one in algorithm.train() if one.phase == "grpo"]
    assert len(metrics) == 2
    assert all(math.isfinite(value) for one in metrics for value in one.values.values())
    needed = needs_agreement(algorithm.reward)
    assert needed == (reward in ("agreement", COMPOSED))
    for group, first_token, compared in vlm.asked:
        assert first_token == (needed and group == 1)  # never the distributions of whole groups
        assert compared == (needed and group == 3)
    assert {group for group, _, _ in vlm.asked} == {1, 3}


def test_grpo_is_paid_what_the_reward_says() -> None:
    seen: list[torch.Tensor] = []

    def spy(scores: Scores, full: Scores) -> torch.Tensor:
        seen.append(resolve_reward(COMPOSED)(scores, full))
        return seen[-1]

    spy.needs_agreement = True  # type: ignore[attr-defined]
    spied = list(grpo(FakeVLM(), FakeTask(40), WIDTH, spy).train())
    named = list(grpo(FakeVLM(), FakeTask(40), WIDTH, COMPOSED).train())
    for one, other, reward in zip(spied[1:], named[1:], seen, strict=True):
        assert one.values["reward"] == other.values["reward"] == pytest.approx(float(reward.mean()))
        assert reward.shape == (4, 3)


def test_grpo_on_the_embedded_model_learns_from_agreement_and_never_from_answers(tiny: HuggingFaceVLM) -> None:
    """Wrong answers to every question, the same training."""
    from grip_env.tasks.scenes import SceneTask

    class Mislabelled(SceneTask):
        def example(self, split: str, index: int) -> Example:
            return dataclasses.replace(super().example(split, index), answer="left")

    runs = []
    for task in (SceneTask(), Mislabelled()):
        algorithm = grpo(tiny, task, tiny.width, "agreement", warmup_steps=0, max_budget=0.2)
        runs.append([one.values for one in algorithm.train()])
    for one, other in zip(*runs, strict=True):
        assert one["reward"] < -1e-3
        assert one["gradient_norm"] > 0
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-2)
        assert abs(one["log_likelihood"] - other["log_likelihood"]) > 0.1


def test_rewards_of_another_shape_stop_training_with_both_shapes() -> None:
    def of_the_image(scores: Scores, full: Scores) -> torch.Tensor:
        return full.log_likelihood

    with pytest.raises(ValueError, match=r"of_the_image.* gave shape \(4, 1\), expected \(4, 3\)"):
        list(grpo(FakeVLM(), FakeTask(40), WIDTH, of_the_image).train())


def test_a_pool_that_held_no_distributions_gets_them_when_asked() -> None:
    vlm = WatchedVLM()
    pool = ExamplePool(vlm, FakeTask(40), "train", size=8, reuse=2)
    assert pool.batch(4)[1].first_token is None
    for _ in range(4):  # new examples come in between
        encoded, full = pool.batch(4, first_token=True)
        assert full.first_token is not None
        expected = expected_first_token(encoded.full_selection())
        torch.testing.assert_close(full.first_token, expected)
        torch.testing.assert_close(full.log_likelihood, vlm.log_likelihood(encoded, encoded.full_selection()))
    other = ExamplePool(WatchedVLM(), FakeTask(40), "train", size=8, reuse=2)
    keys = [[example.key for example in other.batch(4)[0].examples] for _ in range(5)]
    assert keys[4] == [example.key for example in encoded.examples]  # asking changes nothing of the order


@pytest.mark.parametrize(
    ("worth", "message"),
    [
        (lambda scores, full: scores.log_likelihood * float("nan"), "is not finite for 1 of 1 selections"),
        (lambda scores, full: None, "gave None, expected a tensor of numbers"),
        (lambda scores, full: 0.5, r"gave shape \(\), expected \(1, 1\)"),
    ],
)
def test_rewards_that_are_none_are_refused_and_the_episode_goes_on(worth: Any, message: str) -> None:
    env: Any = gymnasium.make("GRIP/TokenSelection-v0", vlm=FakeVLM(), task=FakeTask(), reward=worth)
    env.reset(seed=0)
    for _ in range(2):  # the episode is as it was: the next step fails alike, and is no step after the end
        with pytest.raises(ValueError, match=message):
            env.unwrapped.step(np.zeros(16, dtype=np.int8))


@pytest.mark.parametrize("name", ["GRIP/TokenSelection-v0", "GRIP/SmallSelection-v0"])
def test_a_reward_that_works_in_place_spoils_nothing(name: str) -> None:
    def spoils(scores: Any, full: Any) -> Any:
        return scores.log_likelihood.sub_(full.log_likelihood.mul_(2))

    options: dict[str, Any] = {"vlm": FakeVLM(), "task": FakeTask()}
    if name == "GRIP/SmallSelection-v0":
        options |= {"k": 2, "table_cache": None}
    env, other = gymnasium.make(name, reward=spoils, **options), gymnasium.make(name, **options)
    action = np.zeros(16, dtype=np.int8)
    action[:2] = 1
    paid = []
    for _ in range(3):
        for each in (env, other):
            each.reset(options={"index": 1})
        _, reward, _, _, info = env.step(action)
        paid.append(reward)
        assert info["log_likelihood"] == other.step(action)[-1]["log_likelihood"]
    assert paid == [paid[0]] * 3


def test_rewards_may_be_arrays_or_carry_gradients() -> None:
    for worth in (lambda s, f: s.log_likelihood.numpy(), lambda s, f: s.log_likelihood.requires_grad_()):
        env = gymnasium.make(
            "GRIP/SmallSelection-v0", vlm=FakeVLM(), task=FakeTask(), k=1, table_cache=None, reward=worth
        )
        env.reset(seed=0)
        assert np.isfinite(env.step(np.eye(16, dtype=np.int8)[3])[1])
