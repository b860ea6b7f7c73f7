"""Invented actions, seeds, options and arguments: each works or is a ValueError with a message, and nothing is lost."""

from __future__ import annotations

import contextlib
import decimal
import fractions
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import VectorEnv
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays, scalar_dtypes

import grip_env
from tests.envs.test_specs import CASES, make, make_many
from tests.fakes import FakeTask, FakeVLM
from tests.fuzz import fuzzed

KINDS = {f"{case} {kind}": (case, kind) for case in CASES for kind in ("single", "vector")}
every_kind = pytest.mark.parametrize("name", KINDS)
NUM_ENVS = 2


@functools.cache
def environment(name: str) -> Any:
    """One environment for all examples, as those that change nothing need no other."""
    case, kind = KINDS[name]
    env = make(case) if kind == "single" else make_many(case, num_envs=NUM_ENVS)
    env.reset(seed=0)
    return env


def state(env: Any) -> list[Any]:
    """Everything that an error must leave as it was."""
    bare = env.unwrapped
    many = isinstance(bare, VectorEnv)
    episodes = bare._episodes if many else [bare._episode]
    return [
        [(episode.instance.index, episode.k, episode.steps, episode.over, episode.violations) for episode in episodes],
        [episode.selection.tolist() for episode in episodes],
        [generator.bit_generator.state for generator in (bare.np_random if many else [bare.np_random])],
        bare.np_random_seed,
    ]


def attempt(env: Any, act: Callable[[], Any]) -> None:
    """Do something that may be refused; then there is one message, and nothing has changed."""
    before = state(env)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium's checkers warn of strange types
        try:
            act()
        except (ValueError, IndexError) as error:
            message = str(error)
            assert message
            assert any(word in message for word in ("action", "seed", "option", "budget", "exist", "k is")), message
            assert data_equivalence(state(env), before)


# -- what is given ---------------------------------------------------------------------------------------


class Unwilling:
    """Cannot be made an array."""

    def __array__(self, *arguments: Any, **named: Any) -> Any:
        raise RuntimeError("no")


def odd_values() -> list[Any]:
    """Return what a beginner's, or an unlucky, policy may give."""
    return [
        None,
        True,
        False,
        np.True_,
        0,
        -1,
        1.5,
        10**400,
        -(10**30),
        float("nan"),
        float("inf"),
        1j,
        "keep",
        "",
        b"\x00\x01",
        [],
        {},
        {"a": 1},
        {1, 2},
        (),
        object(),
        Unwilling(),
        int,
        range(3),
        itertools.count(),
        (i for i in range(3)),
        fractions.Fraction(1, 3),
        decimal.Decimal("0.5"),
        np.float32(0.5),
        np.int64(3),
        np.uint64(2**64 - 1),
        np.datetime64("2020-01-01"),
        np.array(0.5),
        np.array(3),
        np.array([]),
        np.array([0, 1], dtype=object),
        np.ma.masked,
        [[1, 2], [3]],
        [None, 1],
        [0.1, "0.2"],
        torch.tensor(3),
        torch.tensor(0.5, requires_grad=True),
        torch.zeros(16, device="meta"),
    ]


def odd_actions(shape: tuple[int, ...]) -> list[Any]:
    """Return arrays of the right shape, with something else wrong, and others."""
    whole = np.zeros(shape, dtype=np.int64)
    lists = whole.tolist()
    return [
        *odd_values(),
        whole.astype(object),
        whole.astype(str),
        whole.astype("S1"),
        whole.astype(complex),
        whole.astype("datetime64[s]"),
        whole.astype([("a", "i4")]),
        np.full(shape, np.nan),
        np.full(shape, 1e30),
        np.full(shape, -np.inf),
        np.full(shape, 2),
        np.full(shape, 2**63, dtype=np.uint64),
        np.full(shape, np.longdouble("1e4000")) if np.finfo(np.longdouble).max > 1e308 else whole,
        np.ma.masked_array(whole, mask=True),
        np.ma.masked_array(whole, mask=False),
        whole.astype(bool),
        whole[None],
        whole[..., None],
        torch.zeros(shape, requires_grad=True),
        torch.zeros(shape, dtype=torch.bfloat16),
        torch.zeros(shape, device="meta"),
        torch.zeros(shape).to_sparse() if shape else whole,
        [torch.tensor(0.0, requires_grad=True)] * 16,
        [lists, 0] if shape else lists,
        {"action": whole},
    ]


anything = st.one_of(
    st.integers(0, len(odd_values()) - 1).map(lambda i: odd_values()[i]),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-2, 20), st.floats(), st.none(), st.text(max_size=1)), max_size=3),
    arrays(scalar_dtypes(), st.sampled_from([(), (1,), (2,), (16,), (2, 16)])),
)


def action_shape(env: Any) -> tuple[int, ...]:
    shape = env.action_space.shape
    return (NUM_ENVS,) if shape is None else tuple(shape)


# -- doors -----------------------------------------------------------------------------------------------


@every_kind
def test_odd_actions_are_refused_and_the_episode_goes_on(name: str) -> None:
    env = environment(name)
    shape = action_shape(env)
    for number in range(len(odd_actions(shape))):
        env.reset(seed=0)
        attempt(env, lambda number=number: env.step(odd_actions(shape)[number]))  # type: ignore[misc]
    env.reset(seed=0)
    env.step(env.action_space.sample())


@every_kind
@fuzzed
@given(st.data())
def test_invented_actions_are_taken_or_refused(name: str, data: st.DataObject) -> None:
    env = environment(name)
    if not isinstance(env.unwrapped, VectorEnv) and env.unwrapped._episode.over:
        env.reset()
    shape = action_shape(env)
    own = arrays(scalar_dtypes(), st.just(shape))
    action = data.draw(st.one_of(anything, own, st.lists(anything, min_size=2, max_size=2)))
    attempt(env, lambda: env.step(action))


def resets() -> Any:
    keys = st.sampled_from(["index", "budget", "k", "seed", "", 3, None])
    options = st.one_of(anything, st.dictionaries(keys, st.one_of(anything, st.integers(0, 20), st.floats(0, 1))))
    return st.one_of(anything, st.none(), st.integers(0, 5), st.lists(anything, max_size=3)), options


@every_kind
@fuzzed
@given(st.data())
def test_invented_seeds_and_options_are_taken_or_refused(name: str, data: st.DataObject) -> None:
    env = environment(name)
    seeds, options = resets()
    seed, option = data.draw(seeds), data.draw(options)
    attempt(env, lambda: env.reset(seed=seed, options=option))


@pytest.mark.parametrize("kind", ["single", "vector"])
def test_seeds_and_options_of_numpy_are_those_of_python(kind: str) -> None:
    env = environment(f"TokenSelection-v0 binary {kind}")
    plain = env.reset(seed=3, options={"index": 4, "budget": 0.5})
    other = env.reset(seed=np.int64(3), options={"index": np.int32(4), "budget": np.float64(0.5)})
    assert data_equivalence(other, plain, exact=True)
    if kind == "vector":
        plain = env.reset(seed=[3, None], options={"index": [4, 5]})
        env.reset(seed=[3, 4], options={"index": 4, "budget": 0.5})
        env.reset(seed=[3, 4])
        assert env.reset(seed=np.array([3, 9]))[1]["index"].tolist() == env.reset(seed=[3, 9])[1]["index"].tolist()
    for seed in (-1, 1.0, True, "1", np.float64(1), np.array(1), [1.0, 2], [True, 1], [-1, 0], {"a": 1}):
        with pytest.raises(ValueError, match="seed is a whole number, at least 0"):
            env.reset(seed=seed)
    for options in ([], 0, "index", [("index", 3)], {"index"}):
        with pytest.raises(ValueError, match="options of a reset are a dict"):
            env.reset(options=options)
    with pytest.raises(ValueError, match="one number; got True"):
        env.reset(options={"budget": True})


@every_kind
def test_odd_seeds_and_options_are_refused_and_lose_nothing(name: str) -> None:
    env = environment(name)
    for number in range(len(odd_values())):
        attempt(env, lambda number=number: env.reset(seed=odd_values()[number]))  # type: ignore[misc]
        for key in ("index", "budget", "k"):
            attempt(env, lambda number=number, key=key: env.reset(options={key: odd_values()[number]}))  # type: ignore[misc]
        attempt(env, lambda number=number: env.reset(options=odd_values()[number]))  # type: ignore[misc]
    env.reset(seed=0)
    env.step(env.action_space.sample())


ARGUMENTS = {
    "GRIP/TokenSelection-v0": (
        "vlm task split budget action_mode reward over_budget_penalty question_aware render_mode max_tokens "
        "max_question_tokens cache_size feature_dim obs_dtype examples"
    ),
    "GRIP/SequentialSelection-v0": "dense invalid_action_penalty max_invalid_actions",
    "GRIP/ProgressivePruning-v0": "stages stage_budgets attention budget",
    "GRIP/SmallSelection-v0": "k grid enumerate table_cache cache_size",
}
GIVEN = [
    (name, argument, vector)
    for name, arguments in ARGUMENTS.items()
    for argument in [*arguments.split(), *["num_envs", "max_episode_steps"] * (name == "GRIP/TokenSelection-v0")]
    for vector in (False, True)
    if vector or argument not in ("num_envs", "max_episode_steps")
]


def construct(name: str, argument: str, vector: bool, value: Any) -> Any:
    """Make an environment with one argument of one's own."""
    case = next(case for case, (own, _) in CASES.items() if own == name)
    arguments = {**CASES[case][1], **({"num_envs": 2} if vector else {}), argument: value}
    if argument == "stage_budgets":
        arguments.pop("budget", None)
    module, _, kind = (
        gymnasium.spec(name).vector_entry_point.rpartition(":")
        if vector
        else (str(gymnasium.spec(name).entry_point).rpartition(":"))
    )
    return getattr(__import__(module, fromlist=[kind]), kind)(**arguments)


@pytest.mark.parametrize(("name", "argument", "vector"), GIVEN)
def test_odd_arguments_are_refused_by_name_or_work(name: str, argument: str, vector: bool) -> None:
    refused = 0
    for value in odd_values():
        try:
            env = construct(name, argument, vector, value)
        except (ValueError, FileNotFoundError, NotImplementedError) as error:
            refused += bool(str(error))
        else:
            env.close()
    assert refused > 10


@fuzzed
@given(st.sampled_from(GIVEN), anything)
def test_invented_arguments_are_refused_or_work(door: tuple[str, str, bool], value: Any) -> None:
    name, argument, vector = door
    if argument in ("max_tokens", "max_question_tokens", "num_envs") and isinstance(value, int) and value > 100:
        value %= 100
    with contextlib.suppress(ValueError, FileNotFoundError, NotImplementedError):
        construct(name, argument, vector, value).close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": {"low": "a", "high": 0.2}}, "budget"),
        ({"budget": True}, "budget"),
        ({"budget": ["0.1"]}, "budget"),
        ({"budget": {}}, "budget is a range"),
        ({"budget": b"ab"}, "budget"),
        ({"reward": 3}, "got 3"),
        ({"split": None}, "unknown split None"),
        ({"max_tokens": "a"}, "max_tokens must be a whole number"),
        ({"max_tokens": 16.0}, "max_tokens must be a whole number"),
        ({"cache_size": 1.5}, "cache_size must be a whole number"),
        ({"action_mode": None}, "action_mode"),
        ({"feature_dim": True}, "feature_dim"),
        ({"question_aware": "no"}, "question_aware must be True or False; got 'no'"),
        ({"over_budget_penalty": "much"}, "over_budget_penalty must be a finite number"),
        ({"vlm": FakeVLM}, "vlm must be the name"),
        ({"vlm": torch.nn.Linear(2, 2)}, r"HuggingFaceVLM\(model, processor\)"),
        ({"task": 3}, "task must be 'scenes'"),
        ({"task": FakeTask}, "task must be 'scenes'"),
    ],
)
@pytest.mark.parametrize("vector", [False, True], ids=["single", "vector"])
def test_wrong_arguments_say_which(arguments: dict[str, Any], message: str, vector: bool) -> None:
    given_all = {"vlm": FakeVLM(), "task": FakeTask(), **arguments}
    kind: Any = grip_env.TokenSelectionVectorEnv if vector else grip_env.TokenSelectionEnv
    with pytest.raises(ValueError, match=message):
        kind(**given_all)


@pytest.mark.parametrize("count", [0, -1, "2", 2.0, None, True])
def test_a_number_of_environments_is_a_whole_number(count: Any) -> None:
    with pytest.raises(ValueError, match="num_envs must be"):
        grip_env.TokenSelectionVectorEnv(count, vlm=FakeVLM(), task=FakeTask())


@every_kind
def test_what_comes_too_early_or_twice_is_refused_or_harmless(name: str) -> None:
    case, kind = KINDS[name]
    env: Any = make(case, render_mode="rgb_array") if kind == "single" else make_many(case, render_mode="rgb_array")
    bare = env.unwrapped
    for act in (lambda: bare.step(bare.action_space.sample()), bare.render):
        with pytest.raises(gymnasium.error.ResetNeeded):
            act()
    env.reset(seed=0)
    if kind == "single":
        while not env.step(env.action_space.sample())[2]:
            pass
        with pytest.raises(gymnasium.error.ResetNeeded, match="ended at step"):
            bare.step(bare.action_space.sample())
    env.close()
    bare.close()


@pytest.mark.parametrize("kind", ["TokenSelection-v0 scores vector", "SequentialSelection-v0 dense vector"])
def test_odd_actions_through_stable_baselines_are_refused_and_the_episodes_go_on(kind: str) -> None:
    envs = grip_env.as_sb3_vec_env(make_many(KINDS[kind][0], num_envs=NUM_ENVS))
    envs.seed(0)
    envs.reset()
    shape = (NUM_ENVS, *envs.action_space.shape)  # type: ignore[misc]
    for number in range(len(odd_actions(shape))):
        inner: Any = envs.envs  # type: ignore[attr-defined]
        attempt(inner, lambda number=number: envs.step(odd_actions(shape)[number]))  # type: ignore[misc]
    envs.step(np.stack([envs.action_space.sample() for _ in range(NUM_ENVS)]))
