"""Stacked infos equal what Gymnasium's own vector environments make of the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from hypothesis import given
from hypothesis import strategies as st

from grip_env.envs.core.vector_env import stack_infos, stack_observations

KINDS: dict[str, st.SearchStrategy[Any]] = {
    "k": st.integers(-5, 5),
    "reward": st.floats(-1, 1),
    "correct": st.booleans(),
    "single": st.floats(-1, 1, width=32).map(np.float32),
    "truth": st.booleans().map(np.bool_),
    "family": st.sampled_from(["colour", "shape"]),
    "kept": st.lists(st.integers(0, 9), max_size=3),
    "action_mask": st.lists(st.integers(0, 1), min_size=4, max_size=4).map(lambda row: np.array(row, dtype=np.int8)),
    "final_obs": st.fixed_dictionaries({"budget": st.floats(0, 1)}),
}
ROWS = st.fixed_dictionaries({}, optional=KINDS | {"final_info": st.fixed_dictionaries({}, optional=KINDS)})


@given(st.lists(ROWS, min_size=1, max_size=5))
def test_infos_are_joined_as_gymnasium_joins_them(rows: list[dict[str, Any]]) -> None:
    envs: Any = VectorEnv()
    envs.num_envs = len(rows)
    expected: dict[str, Any] = {}
    for i, row in enumerate(rows):
        expected = envs._add_info(expected, row, i)
    stacked = stack_infos(rows)
    assert sorted(stacked) == sorted(expected)
    _check_same(stacked, expected)


def _check_same(stacked: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, column in expected.items():
        if isinstance(column, dict):
            _check_same(stacked[key], column)
            continue
        assert stacked[key].dtype == column.dtype, key
        np.testing.assert_array_equal(stacked[key], column, strict=True)


def test_joined_observations_are_fresh() -> None:
    rows = [{"tokens": np.full((2, 3), value)} for value in (1.0, 2.0)]
    stacked = stack_observations(rows)
    stacked["tokens"][:] = 0
    assert rows[0]["tokens"].all()
    assert stacked["tokens"].shape == (2, 2, 3)
