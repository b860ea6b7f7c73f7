"""Run folders with damage: states and logs of any content are read, and say that they are damaged or nothing."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from grip_env.reports.saved_runs import Run, read_log
from grip_env.run_folder.status import FILE, STATES, RunStatus, read_status, unfinished
from tests.fuzz import fuzzed

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "state": st.sampled_from(STATES) | plain,
        "phase": st.sampled_from(["", "warmup", "grpo"]) | plain,
        "step": st.integers(-3, 1000) | plain,
        "steps": st.none() | st.integers(-3, 1000) | plain,
        "reason": plain,
        "more": plain,
    },
)
states = st.one_of(fields, fields, plain).map(lambda value: json.dumps(value).encode())


@fuzzed
@given(content=st.one_of(states, states, st.binary(max_size=40)), cut=st.integers(0, 200))
def test_any_status_is_a_state_or_unknown(tmp_path: Path, content: bytes, cut: int) -> None:
    (tmp_path / FILE).write_bytes(content[:cut])
    status = read_status(tmp_path)
    assert isinstance(status, RunStatus)
    assert status.state in (*STATES, "unknown")
    assert (status.mark == "") == (status.state == "done") == (unfinished(tmp_path) is None)
    assert Run(tmp_path, {"config": {"algo": "grpo"}}).label.startswith("grpo")


rows = st.lists(
    st.lists(
        st.one_of(st.floats().map(repr), st.integers().map(str), st.text(max_size=6), st.just('"')), max_size=5
    ).map(",".join),
    max_size=6,
)


@fuzzed
@given(head=st.sampled_from(["step,seconds,forwards", "step", "", "seconds,forwards"]) | st.text(max_size=20),
       body=rows, end=st.sampled_from(["\n", "\r\n", ""]), junk=st.binary(max_size=8))  # fmt: skip
def test_any_log_is_rows_of_numbers(tmp_path: Path, head: str, body: list[str], end: str, junk: bytes) -> None:
    text = end.join([head, *body])
    (tmp_path / "grpo.csv").write_bytes(text.encode(errors="replace") + junk)
    for row in read_log(tmp_path / "grpo.csv"):
        assert all(isinstance(value, float) for value in row.values())
    cost = Run(tmp_path, {"config": {"algo": "grpo"}}).training_cost()
    assert cost is None or set(cost) == {"seconds", "forwards"}
