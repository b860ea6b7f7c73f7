from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import grip_env
from agents.base import keep_best
from grip_env.envs.core.sampling import tokens_in_budget
from grip_env.envs.progressive import ProgressivePruningEnv, ProgressivePruningVectorEnv
from grip_env.envs.pruning_schedule import PruningSchedule
from grip_env.envs.selection import TokenSelectionEnv
from grip_env.tasks.base import Example
from grip_env.vlms.decoder.staged_forward import StagedForward
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.envs.test_specs import assert_alike
from tests.fakes import INFO_KEYS, FakeTask, FakeVLM, indices
from tests.vlms import tiny_models
from tests.vlms.decoder.test_staged_forward import build
from tests.vlms.families.test_known import examples

LAYERS, TOKENS = 5, 36  # of the model below, which has random weights and answers as badly as it likes
VLM = build("llava", LAYERS)
STAGES = (0, 1, 3)


class Pictures:
    """Pictures of two shapes, questions and answers of several lengths."""

    name = "pictures"
    splits = ("train",)

    def size(self, split: str) -> int:
        return 6

    def example(self, split: str, index: int) -> Example:
        return examples(6)[index]


class Renamed(FakeTask):
    """The same pictures and questions with another answer."""

    def example(self, split: str, index: int) -> Example:
        return dataclasses.replace(super().example(split, index), answer="three blue circles")


def make(**arguments: Any) -> ProgressivePruningEnv:
    defaults: dict[str, Any] = {"vlm": VLM, "task": FakeTask(), "stages": STAGES}
    return ProgressivePruningEnv(**(defaults | arguments))


def mask(*chosen: int, count: int = TOKENS) -> np.ndarray:
    action = np.zeros(count, dtype=np.int8)
    action[list(chosen)] = 1
    return action


def play(env: ProgressivePruningEnv, actions: Sequence[np.ndarray], **reset: Any) -> tuple[float, list[dict[str, Any]]]:
    """Play an episode; the last reward, and the info of reset and of each step."""
    _, info = env.reset(**reset)
    infos, reward = [info], math.nan
    for number, action in enumerate(actions, 1):
        _, reward, terminated, truncated, info = env.step(action)
        assert (terminated, truncated) == (number == len(actions), False)
        assert terminated or reward == 0.0
        infos.append(info)
    return reward, infos


# -- the interface ---------------------------------------------------------------------------------------


def test_the_embedded_model_has_four_layers_and_three_stages_by_default() -> None:
    env = gymnasium.make("GRIP/ProgressivePruning-v0", split="test")
    observation, info = env.reset(seed=3)
    assert observation in env.observation_space
    assert observation["tokens"].shape == (144, 128)
    assert (info["k"], info["layer_average_budget"]) == (53, 14.0)  # 4 x 14 places, and 3 are left for 3 layers
    env.step(np.ones(144, dtype=np.int8))
    env.step(np.ones(144, dtype=np.int8))
    *_, terminated, _, info = env.step(np.ones(144, dtype=np.int8))
    assert terminated
    assert info["layer_average_tokens"] == 14.0
    assert len(indices(info["kept"])) == 1


def test_observations_have_the_documented_fields_throughout() -> None:
    env = make(attention=True, budget=0.3)
    observation, _ = env.reset(seed=0)
    for step in range(4):
        shapes = {key: (value.shape, value.dtype) for key, value in observation.items()}
        assert shapes == {
            "tokens": ((TOKENS, 32), np.float32),
            "token_mask": ((TOKENS,), np.int8),
            "positions": ((TOKENS, 2), np.float32),
            "question": ((24, 32), np.float32),
            "question_mask": ((24,), np.int8),
            "budget": ((1,), np.float32),
            "remaining": ((1,), np.float32),
            "stage": ((3,), np.int8),
            "attention": ((TOKENS,), np.float32),
        }
        assert observation in env.observation_space
        assert observation["stage"].tolist() == [int(step == stage) for stage in range(3)]
        if step < 3:
            observation, *_ = env.step(env.action_space.sample())
    assert observation["budget"] == observation["remaining"] == 0.0
    assert "attention" not in make().observation_space.spaces  # type: ignore[attr-defined]
    assert "question" not in make(question_aware=False).reset(seed=0)[0]


@pytest.mark.parametrize("relevance", [True, False])
def test_info_has_the_documented_keys_and_plain_finite_values(relevance: bool) -> None:
    env = make(task=FakeTask(relevance=relevance))
    own = {"stage_index", "layer", "over_budget", "layer_average_budget", "layer_average_tokens", "flops_saved"}
    _, infos = play(env, [mask(1, 2, 3)] * 3, seed=0)
    assert [set(info) for info in infos] == [INFO_KEYS | own] * 4
    assert [(info["stage_index"], info["layer"]) for info in infos] == [(0, 0), (0, 0), (1, 1), (2, 3)]
    assert [info["scored"] for info in infos] == [False, False, False, True]
    assert [info["flops_saved"] > 0 for info in infos] == [False, False, False, True]
    assert [info["kept_count"] for info in infos] == [36, 3, 3, 3]
    assert infos[0]["k"] == infos[1]["k"]
    for info in infos:
        for value in info.values():
            assert value.shape == () or (value.dtype, value.shape) == (bool, (36,))
            assert np.isfinite(value).all()


def test_returned_arrays_are_copies() -> None:
    env, twin = make(attention=True), make(attention=True)
    observation, info = env.reset(seed=0)
    expected, _ = twin.reset(seed=0)
    for _ in range(3):
        for value in observation.values():
            value.fill(1)
        info["relevant"].fill(False)
        info["kept"].fill(False)
        observation, _, _, _, info = env.step(mask(1, 2, 3, 4))
        expected, *_ = twin.step(mask(1, 2, 3, 4))
        for key, value in expected.items():
            np.testing.assert_array_equal(observation[key], value)
    assert indices(info["relevant"])


# -- what the model is asked -----------------------------------------------------------------------------


def test_the_agent_sees_the_models_hidden_states_of_what_survives() -> None:
    env = make(stage_budgets=(1.0, 1.0, 1.0), attention=True)
    observation, info = env.reset(seed=1)
    run = StagedForward(VLM, VLM.encode([FakeTask().example("train", info["index"])]))
    generator = np.random.default_rng(0)
    alive = np.ones(TOKENS, dtype=bool)
    for step in range(4):
        run.advance(STAGES[min(step, 2)])
        np.testing.assert_allclose(observation["tokens"], run.hidden()[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(observation["attention"], run.attention()[0].numpy(), atol=1e-6)
        assert observation["token_mask"].tolist() == alive.tolist()
        for key in ("tokens", "positions", "attention"):
            assert (observation[key][~alive] == 0).all()
            assert (observation[key][alive] != 0).any()
        if step < 3:
            keep = generator.random(TOKENS) < 0.7
            alive &= keep
            run.drop(torch.from_numpy(keep)[None])
            observation, reward, _, _, info = env.step(keep.astype(np.int8))
            assert indices(info["kept"]) == np.flatnonzero(alive).tolist()
    expected = run.finish()
    assert info["log_likelihood"] == pytest.approx(float(expected.log_likelihood), abs=1e-5)
    assert info["correct"] == bool(expected.correct)
    assert reward == pytest.approx(info["log_likelihood"] - info["full_log_likelihood"], abs=1e-6)


def test_one_stage_before_the_first_layer_is_the_environment_of_one_decision() -> None:
    generator = np.random.default_rng(0)
    for mode, budget in (("binary", (0.02, 0.9)), ("scores", [0.1, 0.5])):
        arguments: dict[str, Any] = {"vlm": VLM, "task": FakeTask(), "budget": budget, "action_mode": mode}
        ours, theirs = ProgressivePruningEnv(stages=[0], **arguments), TokenSelectionEnv(**arguments)
        for episode in range(8):
            seed = 7 if episode == 0 else None
            observation, info = ours.reset(seed=seed)
            expected, start = theirs.reset(seed=seed)
            for key, value in expected.items():
                np.testing.assert_allclose(observation[key], value, atol=1e-6)
            differ = ("kept", "kept_count")  # nothing is chosen yet: there all survive, here none is in
            shared = {key: info[key] for key in start if key not in differ}
            assert data_equivalence(shared, {key: start[key] for key in shared}, exact=True)
            # scores above 0, of which both keep the best k
            action = generator.integers(0, 2, TOKENS) if mode == "binary" else generator.uniform(0.1, 1, TOKENS)
            _, reward, terminated, _, info = ours.step(action)
            _, other, _, _, end = theirs.step(action)
            assert terminated
            assert indices(info["kept"]) == indices(end["kept"])
            assert (info["k"], info["over_budget"]) == (end["k"], end["over_budget"])
            assert reward == pytest.approx(other, abs=1e-4)
            assert info["correct"] == end["correct"]
            assert info["layer_average_tokens"] == len(indices(end["kept"]))


def test_dropping_early_costs_more_than_dropping_late() -> None:
    envs = ProgressivePruningVectorEnv(24, split="validation", stages=(0, 3), stage_budgets=(1.0, 1.0))
    nothing, everything = np.zeros((24, 144), dtype=np.int8), np.ones((24, 144), dtype=np.int8)
    rewards = []
    for first, second in ((nothing, nothing), (everything, nothing), (everything, everything)):
        envs.reset(seed=0)
        envs.step(first)
        rewards.append(envs.step(second)[1])
    early, late, dense = rewards
    np.testing.assert_allclose(dense, 0, atol=1e-4)
    assert early.mean() < late.mean() - 0.5
    assert late.mean() < -0.01


def test_what_the_agent_sees_does_not_depend_on_the_answer() -> None:
    envs = [make(task=task, attention=True, stage_budgets=(1.0, 0.8, 0.5)) for task in (FakeTask(), Renamed())]
    first, second = (env.reset(seed=2)[0] for env in envs)
    for step in range(4):
        for key, value in first.items():
            np.testing.assert_allclose(second[key], value, atol=1e-5)
        if step < 3:
            action = (np.arange(TOKENS) % (5 - step) > 0).astype(np.int8)
            (first, one, *_), (second, other, *_) = (env.step(action) for env in envs)
    assert abs(one - other) > 1e-3


def test_reward_can_be_named_or_given_and_comes_at_the_end() -> None:
    rewards = [
        play(make(reward=reward), [mask(1, 2)] * 3, seed=0)
        for reward in ("probability", "exact_match", lambda scores, full: scores.log_likelihood * 0 - 1.0)
    ]
    assert rewards[0][0] == pytest.approx(math.exp(rewards[0][1][-1]["log_likelihood"]))
    assert rewards[1][0] == float(rewards[1][1][-1]["correct"])
    assert rewards[2][0] == -1.0


# -- budgets ---------------------------------------------------------------------------------------------


def presence(stages: Sequence[int], layers: int, count: int, kept: Sequence[int]) -> list[int]:
    """How many tokens are in each layer, layer by layer."""
    found, alive = [], count
    for layer in range(layers):
        if layer in stages:
            alive = kept[list(stages).index(layer)]
        found.append(alive)
    return found


def test_allowance_is_the_largest_number_with_which_the_budget_can_still_be_kept() -> None:
    generator = np.random.default_rng(0)
    checked = refused = 0
    for _ in range(400):
        layers, count = int(generator.integers(1, 7)), int(generator.integers(1, 9))
        total = int(generator.integers(1, count + 1))
        stages = sorted(generator.choice(layers, int(generator.integers(1, layers + 1)), replace=False).tolist())
        schedule = PruningSchedule(stages, layers)
        sets = [
            kept
            for kept in itertools.product(range(1, count + 1), repeat=len(stages))
            if list(kept) == sorted(kept, reverse=True) and sum(presence(stages, layers, count, kept)) <= layers * total
        ]
        if not sets:
            with pytest.raises(ValueError, match="slots"):
                schedule.check_total(total, count)
            refused += 1
            continue
        schedule.check_total(total, count)
        kept: list[int] = []
        for stage in range(len(stages)):
            possible = [one[stage] for one in sets if list(one[:stage]) == kept]
            assert schedule.allowance(count, total, kept) == max(possible)
            left = layers * total - sum(presence(stages, layers, count, [*kept, *[0] * len(stages)])[: stages[stage]])
            share = left / (count * (layers - stages[stage]))
            assert schedule.remaining(count, total, kept) == pytest.approx(min(1.0, share))
            kept.append(int(generator.choice(possible)))
            checked += 1
        assert schedule.spent(count, kept) == sum(presence(stages, layers, count, kept))
    assert checked > 300
    assert refused > 30


def test_no_play_exceeds_its_budget_and_what_was_used_is_told() -> None:
    env = make(budget=(0.3, 0.9), stages=(1, 2, 4))
    config = VLM.model.config.text_config
    width, groups = config.hidden_size, config.num_key_value_heads / config.num_attention_heads
    generator = np.random.default_rng(0)
    for episode in range(20):
        _, start = env.reset(seed=3 if episode == 0 else None)
        kept = []
        for _ in range(3):
            *_, info = env.step((generator.random(TOKENS) < generator.uniform(0.2, 1)).astype(np.int8))
            assert len(indices(info["kept"])) <= info["k"]
            kept.append(len(indices(info["kept"])))
        used = presence((1, 2, 4), LAYERS, TOKENS, kept)
        assert info["layer_average_tokens"] == pytest.approx(np.mean(used))
        assert np.mean(used) <= start["layer_average_budget"]
        encoded = VLM.encode([FakeTask().example("train", start["index"])])
        words = int(encoded.lengths - encoded.answer_lengths) - TOKENS

        def flops(tokens: Sequence[int], words: int = words) -> float:
            """By layer: queries and outputs, keys and values, three matrices of the MLP, scores and sums; the head."""
            matrices = 2 * width**2 * (1 + groups) + 3 * width * config.intermediate_size
            lengths = np.array(tokens) + words
            return float((2 * lengths * matrices + 4 * lengths**2 * width).sum()) + 2 * width * config.vocab_size

        assert info["flops_saved"] == pytest.approx(1 - flops(used) / flops([TOKENS] * LAYERS))


def test_a_share_for_each_stage_is_of_all_tokens() -> None:
    env = make(stage_budgets=(0.5, 0.25, 0.01))
    _, infos = play(env, [np.ones(TOKENS, dtype=np.int8)] * 3, seed=0)
    assert [info["k"] for info in infos] == [18, 18, 9, 1]
    assert [info["over_budget"] for info in infos[1:]] == [18, 9, 8]
    used = presence(STAGES, LAYERS, TOKENS, [18, 9, 1])
    assert infos[0]["layer_average_budget"] == infos[-1]["layer_average_tokens"] == np.mean(used)
    _, infos = play(env, [mask(*range(5))] * 3, seed=0)
    assert [info["k"] for info in infos] == [18, 18, 5, 1]  # never more than there are


def test_scores_keep_the_best_of_a_share_or_the_positive_within_the_total() -> None:
    scores = np.linspace(-1, 1, TOKENS)  # the upper half is positive
    env = make(stage_budgets=(0.75, 0.5, 0.25), action_mode="scores")
    _, infos = play(env, [scores, -scores, scores], seed=0)
    assert [indices(info["kept"]) for info in infos[1:]] == [[*range(9, 36)], [*range(9, 27)], [*range(18, 27)]]
    env = make(budget=0.4, action_mode="scores")  # 14 x 5 places
    _, infos = play(env, [scores, scores - 0.5, np.full(TOKENS, 1e30)], seed=0)
    first = [*range(18, 36)]
    assert [indices(info["kept"]) for info in infos[1:3]] == [first, [token for token in first if scores[token] > 0.5]]
    assert len(indices(infos[2]["kept"])) == 9
    assert infos[3]["k"] == min(9, (70 - 18 - 2 * 9) // 2) == 9
    _, infos = play(env, [np.ones(TOKENS), scores, -np.ones(TOKENS)], seed=0)
    assert [len(indices(info["kept"])) for info in infos[1:]] == [36, 16, 0]
    assert infos[2]["k"] == (70 - 36 - 2) // 2 == 16  # of 18 above 0
    assert indices(infos[2]["kept"]) == [*range(20, 36)]
    assert all(info["over_budget"] == 0 for info in infos[1:])


def test_over_budget_actions_keep_a_random_part_of_what_survives_and_may_cost() -> None:
    env = make(stage_budgets=(0.5, 0.25, 0.25), over_budget_penalty=0.5)
    counts = np.zeros(TOKENS)
    env.reset(seed=0, options={"index": 3})
    for _ in range(200):
        _, reward, _, _, info = env.step(mask(*range(0, 20)))
        assert (reward, info["over_budget"]) == (-1.0, 2)
        first = indices(info["kept"])
        _, reward, _, _, info = env.step(np.ones(TOKENS, dtype=np.int8))
        assert (reward, info["over_budget"], len(indices(info["kept"]))) == (-4.5, 9, 9)
        assert set(indices(info["kept"])) <= set(first) <= set(range(20))
        counts[indices(info["kept"])] += 1
        _, reward, _, _, info = env.step(np.ones(TOKENS, dtype=np.int8))
        assert info["over_budget"] == 0
        assert reward == pytest.approx(info["log_likelihood"] - info["full_log_likelihood"], abs=1e-6)
        env.reset(options={"index": 3})
    np.testing.assert_allclose(counts[:20] / 200, 9 / 20, atol=0.12)  # over three standard deviations


def test_nothing_left_is_allowed_and_stays_so() -> None:
    env = make(attention=True)
    env.reset(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for action in (mask(), mask(1, 2, 3), np.ones(TOKENS, dtype=np.int8)):
            observation, _, _, _, info = env.step(action)
            assert indices(info["kept"]) == []
            assert observation in env.observation_space
            assert observation["budget"] == 0.0
            assert (observation["tokens"] == 0).all()
    example = FakeTask().example("train", 0)
    encoded = VLM.encode([example])
    blind = VLM.score(encoded, torch.zeros_like(encoded.full_selection()))
    env.reset(options={"index": 0})
    for _ in range(3):
        *_, info = env.step(mask())
    assert info["log_likelihood"] == pytest.approx(float(blind.log_likelihood), abs=1e-5)
    assert info["layer_average_tokens"] == 0.0


def test_policies_of_the_other_environment_keep_within_the_budget() -> None:
    for budgets in ({"budget": (0.02, 0.9)}, {"stage_budgets": (0.7, 0.31, 0.07)}):
        env = make(**budgets)
        for _ in range(6):
            observation, info = env.reset(seed=None)
            for _ in range(3):
                keep = keep_best(np.linalg.norm(observation["tokens"], axis=1), observation)
                observation, _, _, _, info = env.step(keep.astype(np.int8))
                assert (len(indices(info["kept"])), info["over_budget"]) == (info["k"], 0)


def test_impossible_budgets_are_refused_with_the_arithmetic_and_a_way_out() -> None:
    arguments: dict[str, Any] = {"stages": (2, 4), "task": FakeTask()}
    with pytest.raises(
        ValueError, match=r"5 x 4 = 20 slots.*2 x 36 = 72 before it.*3 layers after it makes 75"
    ) as error:
        make(budget=0.1, **arguments)
    enough = float(str(error.value).split("budget of ")[-1].split()[0])
    make(budget=enough, **arguments)
    for budget in (enough - 1 / TOKENS, (0.1, 0.9), [0.8, 0.2]):
        with pytest.raises(ValueError, match=f"give a budget of {enough:.4g} or more"):
            make(budget=budget, **arguments)
    env, twin = make(budget=0.8, **arguments), make(budget=0.8, **arguments)
    env.reset(seed=0)
    twin.reset(seed=0)
    with pytest.raises(ValueError, match="75"):
        env.reset(seed=1, options={"budget": 0.1})
    assert data_equivalence(env.reset()[1], twin.reset()[1], exact=True)  # nothing was drawn
    make(stage_budgets=(0.05, 0.01), **arguments)  # each stage says what it may: nothing is impossible


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": ()}, "indices of decoder layers"),
        ({"stages": 2}, "indices of decoder layers"),
        ({"stages": (0.5,)}, "indices of decoder layers"),
        ({"stages": (True,)}, "indices of decoder layers"),
        ({"stages": (1, 1)}, r"strictly increasing; got \(1, 1\)"),
        ({"stages": (2, 0)}, "strictly increasing"),
        ({"stages": (-1, 0)}, "from 0 to 4"),
        ({"stages": (0, 5)}, r"from 0 to 4, as the language model has 5; got \(0, 5\)"),
        ({"stage_budgets": (0.5, 0.2)}, "one share for each of the 3 stages"),
        ({"stage_budgets": (0.5, 0.2, 0.3)}, r"must not increase.*\(0.5, 0.2, 0.3\)"),
        ({"stage_budgets": (0.5, 0.2, 0.0)}, r"in \(0, 1\]; got 0"),
        ({"stage_budgets": (0.5, 0.2, 0.1), "budget": 0.3}, "budget=0.3 and stage_budgets=.*give one"),
        ({"budget": 1.5}, "budget is a share"),
        ({"action_mode": "sequential"}, "'binary' or 'scores'"),
        ({"render_mode": "ansi"}, "'ansi'"),
    ],
)
def test_bad_arguments_are_refused_with_the_fix(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_models_whose_layers_are_out_of_reach_are_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="'fake' is a FakeVLM"):
        make(vlm=FakeVLM())
    with pytest.raises(NotImplementedError, match="paligemma"):
        make(vlm=HuggingFaceVLM(*tiny_models.build("paligemma")))


# -- episodes --------------------------------------------------------------------------------------------


def test_seeds_give_the_episodes_of_the_other_environment_whatever_the_agent_does() -> None:
    env = make(budget=(0.05, 0.9))
    other = TokenSelectionEnv(vlm=VLM, task=FakeTask(), budget=(0.05, 0.9))
    for episode in range(12):
        seed = 5 if episode == 0 else None
        _, info = env.reset(seed=seed)
        _, expected = other.reset(seed=seed)
        assert env.example.question == other.example.question
        for key in ("index", "full_log_likelihood"):
            assert info[key] == expected[key]
        assert indices(info["relevant"]) == indices(expected["relevant"])
        assert info["layer_average_budget"] == expected["k"]
        for _ in range(episode % 4):
            env.step(np.ones(TOKENS, dtype=np.int8))  # over budget: draws, and may not shift the stream


def test_options_fix_an_episode() -> None:
    env = make(budget=(0.05, 0.9))
    _, info = env.reset(seed=0, options={"index": 7, "budget": 0.5})
    assert (info["index"], info["layer_average_budget"]) == (7, 18.0)
    with pytest.raises(ValueError, match="budget, index"):
        env.reset(options={"stage": 1})
    env = make(stage_budgets=(0.5, 0.5, 0.5))
    assert env.reset(options={"index": 2})[1]["index"] == 2
    with pytest.raises(ValueError, match=r"no meaning here: stage_budgets=\(0.5, 0.5, 0.5\)"):
        env.reset(options={"budget": 0.5})


def test_step_needs_a_running_episode_and_refused_actions_leave_it_as_it_was() -> None:
    env = make()
    with pytest.raises(gymnasium.error.ResetNeeded, match="not begun"):
        env.step(mask())
    with pytest.raises(gymnasium.error.ResetNeeded):
        make(render_mode="rgb_array").render()
    env.reset(seed=0)
    env.step(mask(1, 2, 3))
    for action, message in ((np.zeros(35), r"\(35,\), expected \(36,\)"), (np.full(TOKENS, 0.5), "action_mode")):
        with pytest.raises(ValueError, match=message):
            env.step(action)
    assert env.step(mask(2))[-1]["stage_index"] == 1
    env.step(mask(2))
    with pytest.raises(gymnasium.error.ResetNeeded, match="ended at step 3"):
        env.step(mask(2))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_it_pickles_at_any_time(steps: int) -> None:
    env = make(attention=True)
    env.reset(seed=0)
    for step in range(steps):
        env.step(mask(*range(9 - step)))
    twin = pickle.loads(pickle.dumps(env))
    for step in range(steps, 3):
        found, expected = twin.step(mask(*range(9 - step))), env.step(mask(*range(9 - step)))
        assert data_equivalence(found, expected, exact=True)
    assert data_equivalence(play(twin, [mask(1, 2)] * 3, seed=4), play(env, [mask(1, 2)] * 3, seed=4), exact=True)


# -- many at once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("llava", {"budget": (0.05, 0.6)}),
        ("llava", {"action_mode": "scores", "question_aware": False, "budget": [0.25, 0.5], "attention": True}),
        ("llava_next", {"stage_budgets": (0.7, 0.4, 0.1), "over_budget_penalty": 0.1, "task": Pictures()}),
        ("smolvlm", {"action_mode": "scores", "budget": 0.3, "cache_size": 1, "task": FakeTask(relevance=False)}),
    ],
)
def test_equals_single_environments_run_in_turn(kind: str, arguments: dict[str, Any]) -> None:
    vlm = build(kind, LAYERS)
    settings: dict[str, Any] = {"vlm": vlm, "task": FakeTask(), "stages": STAGES, "max_tokens": 140} | arguments
    ours = ProgressivePruningVectorEnv(3, **settings)
    theirs: SyncVectorEnv = SyncVectorEnv(
        [lambda: ProgressivePruningEnv(**settings)] * 3, autoreset_mode=AutoresetMode.SAME_STEP
    )
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert_alike(ours.reset(seed=7), theirs.reset(seed=7))
    theirs.action_space.seed(0)
    for step in range(12):  # four episodes
        actions = theirs.action_space.sample()
        found = ours.step(actions)
        assert_alike(found, theirs.step(actions))
        assert found[2].all() == (step % 3 == 2)
        assert found[0] in ours.observation_space
    theirs.step(actions)
    ours.step(actions)
    assert_alike(ours.reset(), theirs.reset())  # on the way; without a seed both go on
    assert_alike(ours.reset(seed=[3, None, 3]), theirs.reset(seed=[3, None, 3]))


def test_all_instances_share_one_pass() -> None:
    calls: list[tuple[int, ...]] = []
    envs = ProgressivePruningVectorEnv(4, vlm=VLM, task=FakeTask(), stages=STAGES, budget=0.5)
    envs.reset(seed=0, options={"index": [0, 1, 2, 3]})
    envs.reset(options={"index": [0, 1, 2, 3]})
    blocks = VLM.model.model.language_model.layers
    hooks = [
        block.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[0].shape[:2]))) for block in blocks
    ]
    try:
        envs.step(np.tile(mask(*range(20)), (4, 1)))
        longest = max(shape[1] for shape in calls)
        assert calls == [(4, longest)]
        envs.step(np.tile(mask(*range(8)), (4, 1)))
        assert calls[1:] == [(4, longest - 12)] * 2
    finally:
        for hook in hooks:
            hook.remove()


def test_options_hold_for_all_or_for_each() -> None:
    envs = ProgressivePruningVectorEnv(3, vlm=VLM, task=FakeTask(), stages=(2, 4), budget=0.8)
    _, infos = envs.reset(seed=0, options={"index": [4, 2, 4], "budget": [0.5, 0.6, 0.7]})
    assert infos["index"].tolist() == [4, 2, 4]
    assert infos["layer_average_budget"].tolist() == [tokens_in_budget(share, TOKENS) for share in (0.5, 0.6, 0.7)]
    twin = ProgressivePruningVectorEnv(3, vlm=VLM, task=FakeTask(), stages=(2, 4), budget=0.8)
    twin.reset(seed=0, options={"index": [4, 2, 4], "budget": 0.5})
    for options, message in (({"budget": [0.5, 0.5, 0.1]}, "75"), ({"index": [1, 2]}, "2 values for 3")):
        with pytest.raises(ValueError, match=message):
            envs.reset(seed=9, options=options)
    assert envs.reset()[1]["index"].tolist() == twin.reset()[1]["index"].tolist()


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_a_limit_truncates_as_gymnasiums_wrapper_does(limit: int) -> None:
    settings: dict[str, Any] = {"vlm": VLM, "task": FakeTask(), "stages": STAGES, "budget": (0.1, 0.5)}
    ours, theirs = (
        gymnasium.make_vec(
            "GRIP/ProgressivePruning-v0",
            3,
            mode,
            vector_kwargs={} if mode is None else {"autoreset_mode": AutoresetMode.SAME_STEP},
            max_episode_steps=limit,
            **settings,
        )
        for mode in (None, "sync")
    )
    assert_alike(ours.reset(seed=2), theirs.reset(seed=2))
    theirs.action_space.seed(0)
    for _ in range(7):
        actions = theirs.action_space.sample()
        assert_alike(ours.step(actions), theirs.step(actions))


def test_what_raises_leaves_every_episode_as_it_was() -> None:
    broken: list[str] = []

    def reward(scores: Any, full: Any) -> torch.Tensor:
        if broken:
            raise RuntimeError(broken.pop())
        return scores.log_likelihood

    settings: dict[str, Any] = {"vlm": VLM, "task": FakeTask(), "stages": STAGES, "budget": 0.5, "reward": reward}
    envs, twin = (ProgressivePruningVectorEnv(2, **settings) for _ in "ab")
    for one in (envs, twin):
        one.reset(seed=1)
        one.step(np.tile(mask(*range(15)), (2, 1)))
        one.step(np.tile(mask(*range(9)), (2, 1)))
    actions = np.tile(mask(1, 2), (2, 1))
    broken.append("the reward is out of order")
    with pytest.raises(RuntimeError, match="out of order"):
        envs.step(actions)
    found, expected = envs.step(actions), twin.step(actions)
    np.testing.assert_array_equal(found[1], expected[1])
    for row in range(2):
        assert_alike(found[4]["final_obs"][row], expected[4]["final_obs"][row])
    assert_alike(found[4]["final_info"], expected[4]["final_info"])


def test_misuse_of_many_is_refused() -> None:
    envs = ProgressivePruningVectorEnv(2, vlm=VLM, task=FakeTask())
    with pytest.raises(gymnasium.error.ResetNeeded):
        envs.step(np.zeros((2, TOKENS)))
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"\(36,\), expected \(2, 36\)"):
        envs.step(np.zeros(TOKENS))
    with pytest.raises(ValueError, match="max_episode_steps must be at least 1"):
        ProgressivePruningVectorEnv(2, vlm=VLM, task=FakeTask(), max_episode_steps=0)
    with pytest.raises(NotImplementedError, match="FakeVLM"):
        ProgressivePruningVectorEnv(2, vlm=FakeVLM(), task=FakeTask())


def test_both_environments_take_the_same_arguments() -> None:
    single = dict(inspect.signature(ProgressivePruningEnv).parameters)
    vector = dict(inspect.signature(ProgressivePruningVectorEnv).parameters)
    assert vector.pop("num_envs").default == 1
    assert vector.pop("max_episode_steps").default is None
    assert vector.pop("autoreset_mode").default is AutoresetMode.SAME_STEP
    assert single == vector
    assert grip_env.ProgressivePruningEnv is ProgressivePruningEnv
    assert grip_env.ProgressivePruningVectorEnv is ProgressivePruningVectorEnv


# -- pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [(0,), (0, 1, 2, 3, 4)])
def test_frames_of_an_episode_have_one_size_and_each_shows_more(stages: tuple[int, ...]) -> None:
    env = make(stages=stages, budget=0.4, render_mode="rgb_array")
    env.reset(seed=0)
    frames = [env.render()]
    for step in range(len(stages)):
        env.step(mask(*range(10 - step)))
        frames.append(env.render())
    assert all(frame is not None and frame.dtype == np.uint8 for frame in frames)
    assert len({frame.shape for frame in frames if frame is not None}) == 1
    for one, other in itertools.pairwise(frames):
        assert (one != other).any()


def test_many_show_what_the_last_step_left() -> None:
    settings: dict[str, Any] = {"vlm": VLM, "task": FakeTask(), "stages": (0, 2), "render_mode": "rgb_array"}
    envs = ProgressivePruningVectorEnv(2, budget=0.4, **settings)
    singles = [ProgressivePruningEnv(budget=0.4, **settings) for _ in "ab"]
    envs.reset(seed=0)
    for i, env in enumerate(singles):
        env.reset(seed=i)
    for step in range(3):
        frames = envs.render()
        assert frames is not None
        for frame, env in zip(frames, singles, strict=True):
            np.testing.assert_array_equal(frame, env.render())
        if step < 2:
            envs.step(np.tile(mask(3, 4, 5 + step), (2, 1)))
            for env in singles:
                env.step(mask(3, 4, 5 + step))


def test_rewards_of_share_and_agreement_are_those_of_the_pass() -> None:
    """The share kept is the mean over layers; agreement compares the first answer token with all tokens kept."""
    scores = np.linspace(-1, 1, TOKENS, dtype=np.float32)
    env = make(stages=(0, 2), stage_budgets=(0.5, 0.25), action_mode="scores", reward="kept_fraction")
    reward, infos = play(env, [scores, scores], seed=3)
    assert reward == pytest.approx((18 * 2 + 9 * 3) / (LAYERS * TOKENS))
    assert infos[-1]["layer_average_tokens"] == pytest.approx(reward * TOKENS)
    staged = make(stages=(0,), stage_budgets=(0.2,), action_mode="scores", reward="agreement")
    one_shot = TokenSelectionEnv(vlm=VLM, task=FakeTask(), budget=0.2, action_mode="scores", reward="agreement")
    one_shot.reset(seed=3)
    expected = one_shot.step(scores)[1]
    assert play(staged, [scores], seed=3)[0] == pytest.approx(expected, abs=1e-5)
    assert expected < 0
