"""Runs' config.json with anything in it: read, or refused in one line, and no code that it names is imported."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.pruner import load_agent
from agents.scorer import Scorer, ScorerConfig
from agents.training.options import options_of
from grip_env import evaluate, train
from grip_env.common.errors import CommandError
from grip_env.reports import saved_runs
from grip_env.run_folder.config import ModelConfig, read_run_config
from tests.fakes import WIDTH, FakeTask, FakeVLM
from tests.fuzz import fuzzed

ALGORITHMS = ("grpo", "imitation", "ppo", "no_such_module:Agent")


def valid(algo: str) -> dict[str, Any]:
    """What train writes; classes of one's own have hyperparameters of their own."""
    about = ["--data", "data.jsonl", "--cache", "cache"] if algo == "imitation" else []
    options = train.parse(["--algo", algo, *about]) if ":" not in algo else train.Config(algo=algo)
    saved = train.saved_config(train.Config(**vars(options) | {"options": options.options or ScorerConfig()}))
    more = {"data": {"fingerprint": "f", "sizes": {}}} if about else {}
    more |= {"algorithm": {"folder": "/nowhere"}} if ":" in algo else {}
    whole = {"config": saved, "vlm": {"name": "fake", "checksum": "0"}, "threads": 1, **more}
    return json.loads(json.dumps(whole, default=str))  # type: ignore[no-any-return]


VALID = {algo: valid(algo) for algo in ALGORITHMS}
WRONG = (None, True, -1, 0, 1.5, 10**400, "", "x", "a\0b", "\ud800", [], [1], {}, {"a": 1})


SCORER = Scorer(ScorerConfig(token_width=WIDTH, width=8, blocks=1, heads=1))


class Model(FakeVLM):
    def checksum(self) -> str:
        return "0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("run")
    before = os.getcwd()
    os.chdir(path)
    (path / "agent.py").write_text("raise SystemExit('imported')")
    yield path
    os.chdir(before)


def use(folder: Path, patch: pytest.MonkeyPatch) -> bool:
    """Do what evaluate, probe and Pruner do with a run up to where they load the model; return whether it was read."""

    def loaded(model: ModelConfig, task: str, data: Path | None, skip_bad: bool, splits: Any) -> Any:
        assert all(type(text) is str for text in (model.vlm, model.device, model.dtype, task))
        assert type(skip_bad) is bool
        assert data is None or isinstance(data, Path)
        assert model.cache is None or isinstance(model.cache, Path)
        assert type(model.cache_gib) in (int, float)
        f"{model.cache_gib:g}"
        return Model(), FakeTask()

    patch.setattr(evaluate, "load_model_and_task", loaded)
    patch.setattr(Scorer, "load", lambda _: SCORER)
    modules = set(sys.modules)
    read = False
    try:
        run = saved_runs.load_run(folder)
        read = True
        other = saved_runs.load_run(folder)
        assert len(saved_runs.group_runs([run, other])) == 2  # one seed twice
        run.training_cost()
        evaluate._model_and_task(evaluate.Config((folder,)), run)
        evaluate._check_algo("", [run])
        saved_runs.load_agent(run, Model())
    except CommandError:
        pass
    said = ""
    try:
        load_agent(Model(), "fake", folder)  # type: ignore[arg-type]
    except (FileNotFoundError, ValueError) as error:
        said = str(error)
    assert read or "is not as grip_env.train wrote it" in said or said.startswith("cannot read")
    assert "\n" not in said
    assert not {name for name in set(sys.modules) - modules if name.startswith("agent.") or name == "agent"}
    return read


def write(folder: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_what_train_writes_is_read(
    algo: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, VALID[algo])
    assert use(folder, monkeypatch)
    assert read_run_config(folder, options_of) | {"config": {}} == VALID[algo] | {"config": {}}
    if algo in ("grpo", "imitation"):
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_key_with_a_wrong_value_is_named(
    algo: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = VALID[algo]
    places: list[tuple[str, ...]] = [(), *((key,) for key in whole), *(("config", key) for key in whole["config"])]
    places += [("vlm", "checksum")] + [("data", "fingerprint")] * ("data" in whole)
    places += [
        ("config", key, name) for key, part in whole["config"].items() if isinstance(part, dict) for name in part
    ]
    for place in places:
        for wrong in WRONG if len(place) < 3 else WRONG[::3]:
            content: Any = copy.deepcopy(whole)
            if not place:
                content = wrong
            else:
                part = content
                for key in place[:-1]:
                    part = part[key]
                right, part[place[-1]] = part[place[-1]], wrong
            write(folder, content)
            capsys.readouterr()
            read = use(folder, monkeypatch)
            said = capsys.readouterr().err
            assert all(line.startswith("error: ") for line in said.splitlines()), said
            if not place:
                assert not read
            elif type(right) is not type(wrong) and not read and place != ("config",):
                assert place[-1] in said, (place, wrong, said)
            elif read and place[0] == "config" and ":" not in algo and right is not None and wrong is not None:
                number = type(right) is float and type(wrong) is int
                assert number or type(right) is type(wrong), (place, wrong)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_key_may_be_missing(
    algo: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = VALID[algo]
    for place in [*((key,) for key in whole), *(("config", key) for key in whole["config"]), ("vlm", "checksum")]:
        content = copy.deepcopy(whole)
        del (content if len(place) == 1 else content[place[0]])[place[-1]]
        write(folder, content)
        if not use(folder, monkeypatch):
            assert f"{'.'.join(place)} is missing" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"config": NaN}', "1" * 10_000, "\ufeff{}", "null"])
def test_what_is_no_object_of_json_is_refused(
    text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, text)
    assert not use(folder, monkeypatch)
    assert "config.json is not as grip_env.train wrote it (" in capsys.readouterr().err
    (folder / "config.json").write_bytes(b"\xff\xfe" + json.dumps(VALID["grpo"]).encode())
    assert not use(folder, monkeypatch)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WRONG[:10]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ALGOS = st.sampled_from([*ALGORITHMS, "agent:Own", "os:system", "a:", ":b", ":", "seed", "vlm", "GRPO", "options"])


@st.composite
def contents(draw: st.DrawFn) -> Any:
    """What train writes, with some values replaced, some keys taken out and some put in."""
    content: Any = copy.deepcopy(VALID[draw(st.sampled_from(ALGORITHMS))])
    if draw(st.booleans()):
        content["config"]["algo"] = draw(ALGOS)
    for _ in range(draw(st.integers(1, 4))):
        part = content
        while isinstance(part, dict) and part:
            key = draw(st.sampled_from(sorted(part)) | st.text(max_size=5))
            if key in part and isinstance(part[key], dict) and draw(st.integers(0, 4)):
                part = part[key]
            elif key in part and not draw(st.integers(0, 4)):
                del part[key]
                break
            else:
                part[key] = draw(JSON)
                break
    return content


@fuzzed
@given(content=contents() | JSON)
def test_changed_runs(content: Any, folder: Path) -> None:
    write(folder, content)
    with pytest.MonkeyPatch.context() as patch:
        use(folder, patch)


@fuzzed
@given(data=st.data(), algo=st.sampled_from(ALGORITHMS))
def test_damaged_runs(data: st.DataObject, algo: str, folder: Path) -> None:
    text = bytearray(json.dumps(VALID[algo]).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text)))
        end = min(len(text), place + data.draw(st.integers(0, 20)))
        text[place:end] = data.draw(st.binary(max_size=4))
    (folder / "config.json").write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        use(folder, patch)
