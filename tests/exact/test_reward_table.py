from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

import grip_env
from grip_env.exact.reward_table import RewardTable, count_subsets, score_subsets, subset_masks
from grip_env.pretraining.embedded_models import build_model
from grip_env.tasks.base import Example
from grip_env.tasks.scenes import SceneTask
from grip_env.vlms import load_vlm
from grip_env.vlms.base import Encoded, FrozenVLM, Scores
from grip_env.vlms.blocks import BlockVLM
from grip_env.vlms.cache import tables
from grip_env.vlms.cache.tables import TableCache, resolve_table_cache
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fakes import FakeTask, FakeVLM, expected_log_likelihood


class KnownVLM(FakeVLM):
    """A fake model that can be told from others."""

    def __init__(self, *arguments: Any, mark: str = "known", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.mark = mark

    def fingerprint(self) -> str:
        return self.mark


def encoded_by(vlm: FrozenVLM, index: int = 3) -> Encoded:
    return vlm.encode([FakeTask().example("train", index)])


def mask_of(*tokens: int, count: int = 16) -> np.ndarray:
    selection = np.zeros(count, dtype=bool)
    selection[list(tokens)] = True
    return selection


def by_hand(rewards: list[float]) -> RewardTable:
    """A table of one of as many tokens as there are rewards."""
    return RewardTable(subset_masks(range(len(rewards)), 1), np.array(rewards), len(rewards))


# -- all subsets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "k"), [(range(6), 3), (range(5), 0), (range(4), 4), ([1, 4, 5, 9, 63], 2), (range(16), 4)]
)
def test_masks_are_all_subsets_in_lexicographic_order(tokens: Any, k: int) -> None:
    masks = subset_masks(tokens, k)
    assert masks.dtype == np.uint64
    found = [tuple(bit for bit in range(64) if int(mask) >> bit & 1) for mask in masks]
    assert found == list(itertools.combinations(tokens, k))


def test_too_many_subsets_are_refused_with_the_arithmetic() -> None:
    assert count_subsets(16, 8) == 12870
    assert count_subsets(24, 5) == 42504
    with pytest.raises(ValueError, match=r"C\(24, 6\) = 134,596 .*at most 50,000.*k up to 5 \(C\(24, 5\) = 42,504\)"):
        count_subsets(24, 6)
    for k in (-1, 17):
        with pytest.raises(ValueError, match=f"cannot keep {k} of 16: choose k from 0 to 16"):
            count_subsets(16, k)
    with pytest.raises(ValueError, match="at most 64 can be listed; got 65"):
        count_subsets(65, 1)
    with pytest.raises(ValueError, match="indices below 64; got 64"):
        subset_masks([3, 64], 1)


# -- a table holds what the model says -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> HuggingFaceVLM:
    return load_vlm("tiny")


@pytest.mark.parametrize("reward", ["log_likelihood", "probability", "exact_match"])
def test_rewards_are_those_of_each_subset_scored_alone(
    tiny: HuggingFaceVLM, scene_examples: list[Example], reward: str
) -> None:
    vlm = BlockVLM(tiny, 2, 3)
    encoded = vlm.encode(scene_examples[1:2])
    table = RewardTable.enumerate(vlm, encoded, 2, reward)
    full = vlm.score(encoded, encoded.full_selection())
    assert len(table) == 15
    for row, pair in enumerate(itertools.combinations(range(6), 2)):
        selection = mask_of(*pair, count=6)
        alone = vlm.score(encoded, torch.from_numpy(selection)[None, None])
        expected = grip_env.REWARDS[reward]()(alone, full)
        assert table.rewards[row] == pytest.approx(float(expected), abs=1e-4)
        assert table.reward(selection) == table.rewards[row]
    assert table.rewards.std() > 0.1


def test_optimum_and_gaps_are_those_of_brute_force() -> None:
    vlm = FakeVLM()
    encoded = encoded_by(vlm)
    table = RewardTable.enumerate(vlm, encoded, 3)
    relevant = [token for token in range(16) if FakeTask().example("train", 3).relevance.flat[token]]  # type: ignore
    full = expected_log_likelihood(range(16), relevant)
    expected = {kept: expected_log_likelihood(kept, relevant) - full for kept in itertools.combinations(range(16), 3)}
    assert len(table) == len(expected) == 560
    assert table.optimal_reward == pytest.approx(max(expected.values()), abs=1e-6)
    assert np.flatnonzero(table.optimal).tolist() == sorted(relevant)  # three of them: the best there is
    for kept, reward in list(expected.items())[::37]:
        selection = mask_of(*kept)
        assert table.optimality_gap(selection) == pytest.approx(max(expected.values()) - reward, abs=1e-6)
        better = sum(other > reward + 1e-6 for other in expected.values())
        equal = sum(abs(other - reward) <= 1e-6 for other in expected.values())
        # float32 tells apart what is equal in exact arithmetic, but never by more than the equals
        assert better < table.rank(selection) <= better + equal
    assert table.optimality_gap(table.optimal) == 0.0
    assert table.rank(table.optimal) == 1


def test_full_scores_can_be_given() -> None:
    vlm = FakeVLM()
    encoded = encoded_by(vlm)
    full = Scores(torch.tensor([[-7.0]]), torch.tensor([[True]]), torch.ones(1, 1))
    given = RewardTable.enumerate(vlm, encoded, 1, full=full)
    scored = RewardTable.enumerate(vlm, encoded, 1)
    own = float(vlm.score(encoded, encoded.full_selection()).log_likelihood)
    np.testing.assert_allclose(given.rewards, scored.rewards + own + 7.0, atol=1e-6)


def test_padding_is_in_no_subset() -> None:
    vlm = FakeVLM(count=lambda example: 16 if "number 3" in example.question else 5)
    encoded = vlm.encode([FakeTask().example("train", index) for index in (3, 4)])[[1]]
    table = RewardTable.enumerate(vlm, encoded, 2)
    assert len(table) == 10
    assert not table.optimal[5:].any()
    with pytest.raises(ValueError, match=r"exactly 2 real tokens; got \[1, 7\]"):
        table.reward(mask_of(1, 7))


@pytest.mark.parametrize("k", [0, 16])
def test_nothing_and_everything_are_one_selection(k: int) -> None:
    vlm = FakeVLM()
    table = RewardTable.enumerate(vlm, encoded_by(vlm), k)
    assert len(table) == 1
    assert table.optimal.sum() == k
    assert table.percentile(table.optimal) == 0.5


# -- where a selection stands ----------------------------------------------------------------------------


def test_percentile_counts_half_of_the_equals() -> None:
    table = by_hand([1.0, 2.0, 2.0, 0.0, 2.0])
    found = [table.percentile(mask_of(token, count=5)) for token in range(5)]
    # worse ones: 1, 2, 2, 0, 2; equals, itself among them: 1, 3, 3, 1, 3
    assert found == pytest.approx([1.5 / 5, 3.5 / 5, 3.5 / 5, 0.5 / 5, 3.5 / 5])
    assert np.mean(found) == pytest.approx(0.5)
    assert [table.rank(mask_of(token, count=5)) for token in range(5)] == [4, 1, 1, 5, 1]
    assert table.optimal.tolist() == [False, True, False, False, False]  # the first of the best


def test_what_a_table_returns_is_not_its_own() -> None:
    table = by_hand([1.0, 2.0])
    table.optimal[:] = True
    table.selection(0)[:] = True
    assert table.optimal.tolist() == [False, True]
    assert table.selection(0).tolist() == [True, False]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (mask_of(1, 2, count=5), r"exactly 1 real tokens; got \[1, 2\]"),
        (mask_of(count=5), r"exactly 1 real tokens; got \[\]"),
        (mask_of(1, count=6), r"bool of shape \(5,\); got bool of shape \(6,\)"),
        (np.array([0, 1, 0, 0, 0]), r"bool of shape \(5,\); got int64"),
    ],
)
def test_selections_that_are_not_in_the_table_are_refused(selection: np.ndarray, message: str) -> None:
    table = by_hand([1.0, 2.0, 3.0, 4.0, 5.0])
    for ask in (table.reward, table.optimality_gap, table.percentile, table.rank):
        with pytest.raises(ValueError, match=message):
            ask(selection)


def test_rewards_that_make_no_table_are_refused() -> None:
    vlm = FakeVLM()
    one, two = encoded_by(vlm), vlm.encode([FakeTask().example("train", index) for index in range(2)])
    with pytest.raises(ValueError, match=r"batch of 2: choose one with encoded\[\[row\]\]"):
        RewardTable.enumerate(vlm, two, 1)
    with pytest.raises(ValueError, match="is not finite for 16 of 16 selections"):
        RewardTable.enumerate(vlm, one, 1, lambda scores, full: scores.log_likelihood * torch.nan)
    with pytest.raises(ValueError, match=r"shape \(1,\), expected \(1, 16\)"):
        RewardTable.enumerate(vlm, one, 1, lambda scores, full: scores.log_likelihood.mean(1))
    with pytest.raises(ValueError, match=r"\(3,\) rewards, \(4,\) masks"):
        RewardTable(subset_masks(range(4), 1), np.zeros(3), 4)
    with pytest.raises(ValueError, match="4 of 4 rewards are not finite"):
        RewardTable(subset_masks(range(4), 1), np.full(4, np.nan), 4)


# -- on disk ---------------------------------------------------------------------------------------------


def same(one: Scores, other: Scores) -> bool:
    return one.log_likelihood.equal(other.log_likelihood) and one.correct.equal(other.correct)


def test_scores_are_read_back_with_every_bit_and_serve_any_reward(tmp_path: Path) -> None:
    vlm, plain = KnownVLM(), FakeVLM()
    encoded = encoded_by(vlm)
    cache = TableCache(tmp_path / "tables")
    first = score_subsets(vlm, encoded, 3, cache)
    calls = len(vlm.score_calls)
    again = score_subsets(KnownVLM(), encoded, 3, TableCache(tmp_path / "tables"))
    assert same(first, again)
    assert same(first, score_subsets(plain, encoded, 3))
    full = plain.score(encoded, encoded.full_selection())
    for reward in ("log_likelihood", "probability", "exact_match", "kept_fraction"):
        cached = RewardTable.enumerate(vlm, encoded, 3, reward, full, cache)
        np.testing.assert_array_equal(cached.rewards, RewardTable.enumerate(plain, encoded, 3, reward, full).rewards)
    assert len(vlm.score_calls) == calls
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {name: value.shape for name, value in safetensors.numpy.load_file(file).items()} == {
        "log_likelihood": (1, 560),
        "correct": (1, 560),
        "kept": (1, 560),
    }


def truncated(data: bytes) -> bytes:
    return data[:-7]


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda data: b"", lambda data: b"\0" * 64])
def test_damaged_entries_are_scored_anew_and_replaced(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    vlm = KnownVLM()
    encoded, cache = encoded_by(vlm), TableCache(tmp_path)
    first = score_subsets(vlm, encoded, 2, cache)
    path = cache.path(cache.key(vlm, encoded, 2))
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    calls = len(vlm.score_calls)
    assert same(score_subsets(vlm, encoded, 2, cache), first)
    assert len(vlm.score_calls) == calls + 1
    assert path.read_bytes() == whole


def test_an_entry_under_another_name_is_not_believed(tmp_path: Path) -> None:
    vlm, cache = KnownVLM(), TableCache(tmp_path)
    one, other = encoded_by(vlm, 1), encoded_by(vlm, 2)
    first = score_subsets(vlm, one, 2, cache)
    path = cache.path(cache.key(vlm, other, 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cache.path(cache.key(vlm, one, 2)).read_bytes())
    found = score_subsets(vlm, other, 2, cache)
    assert same(found, score_subsets(FakeVLM(), other, 2))
    assert not same(found, first)


def test_names_depend_on_all_that_scores_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(vlm: Any, k: int = 2, **changes: Any) -> str:
        example = FakeTask().example("train", 3)
        fields = {"image": example.image, "question": "what is it?", "answer": "red"} | changes
        return TableCache(tmp_path).key(vlm, vlm.encode([Example(relevance=example.relevance, **fields)]), k)

    vlm, brighter = KnownVLM(), FakeTask().example("train", 3).image + 1
    keys = [
        key(vlm),
        key(vlm, k=3),
        key(vlm, question="what is this?"),
        key(vlm, answer="blue"),
        key(vlm, image=brighter),
        key(KnownVLM(mark="other")),
        key(KnownVLM(count=lambda example: 9)),
        *(key(BlockVLM(inside, *grid)) for inside in (vlm, KnownVLM(mark="other")) for grid in ((4, 4), (2, 8))),
    ]
    monkeypatch.setattr(tables, "FORMAT", 0)
    keys.append(key(vlm))
    monkeypatch.setattr(grip_env, "__version__", "0.0.0")
    keys.append(key(vlm))
    assert len(set(keys)) == len(keys) == 13
    monkeypatch.undo()
    assert key(KnownVLM(), family="other", key="elsewhere") == keys[0]


def test_fingerprints_tell_models_apart_that_score_otherwise(random_vlm: HuggingFaceVLM) -> None:
    model, processor = random_vlm.model, random_vlm.processor
    other, coarse = (build_model(processor.tokenizer, seed=seed) for seed in (2, 1))
    prints = [
        HuggingFaceVLM(*arguments, **options).fingerprint()
        for arguments, options in (
            ((model, processor), {}),
            ((model, processor), {"position_policy": "reindex"}),
            ((model, processor), {"token_budget": 512}),
            ((other, processor), {}),
            ((coarse.bfloat16(), processor), {}),
        )
    ]
    assert len(set(prints)) == 5
    assert HuggingFaceVLM(model, processor, "another name").fingerprint() == prints[0]
    assert BlockVLM(random_vlm, 4, 4).fingerprint() not in prints


def test_a_folder_that_cannot_be_used_is_a_warning(tmp_path: Path) -> None:
    vlm = KnownVLM()
    encoded, cache = encoded_by(vlm), TableCache(tmp_path)
    (tmp_path / cache.key(vlm, encoded, 2)[:2]).write_text("in the way")
    with pytest.warns(RuntimeWarning, match="scored anew"):
        found = score_subsets(vlm, encoded, 2, cache)
    assert same(found, score_subsets(FakeVLM(), encoded, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        score_subsets(vlm, encoded, 2, cache)


def test_where_tables_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(where: Any = "auto") -> Path | None:
        cache = resolve_table_cache(where, KnownVLM())
        return None if cache is None else cache.folder

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "grip_env" / "tables"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert folder() == tmp_path / ".cache" / "grip_env" / "tables"
    assert folder(tmp_path / "mine") == tmp_path / "mine"
    assert folder(None) is None
    assert list(tmp_path.iterdir()) == []  # nothing is made before it is needed
    assert resolve_table_cache("auto", BlockVLM(FakeVLM())) is None
    with pytest.raises(ValueError, match=r"fake has no fingerprint\(\).*table_cache=None"):
        resolve_table_cache(tmp_path, BlockVLM(FakeVLM()))
    with pytest.raises(ValueError, match=r"'fake' has no fingerprint\(\)"):
        resolve_table_cache(tmp_path, FakeVLM())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        resolve_table_cache(tmp_path / "file", KnownVLM())


def test_processes_share_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from grip_env.exact.reward_table import score_subsets\n"
        "from grip_env.vlms.cache.tables import TableCache\n"
        "from tests.fakes import FakeTask, FakeVLM\n"
        "class KnownVLM(FakeVLM):\n"
        "    def fingerprint(self): return 'known'\n"
        "vlm, cache = KnownVLM(), TableCache(sys.argv[1])\n"
        "for index in range(8):\n"
        "    encoded = vlm.encode([FakeTask().example('train', index)])\n"
        "    found, plain = (score_subsets(vlm, encoded, 2, where) for where in (cache, None))\n"
        "    assert found.log_likelihood.equal(plain.log_likelihood) and found.correct.equal(plain.correct)\n"
        "print('done', 'transformers' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code, str(tmp_path)]
    running = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"
    ]
    for process in running:
        out, err = process.communicate(timeout=240)
        assert out == "done False\n", err
    names = [path.suffix for path in tmp_path.rglob("*") if path.is_file()]
    assert names == [".safetensors"] * 8
    vlm, cache = KnownVLM(), TableCache(tmp_path)
    for index in range(8):
        score_subsets(vlm, encoded_by(vlm, index), 2, cache)
    assert vlm.score_calls == []


def test_tables_know_agreement_where_the_reward_asks_for_it(tmp_path: Path) -> None:
    """Also when the scores on disk were made for a reward that did not."""
    vlm = BlockVLM(load_vlm("tiny"), 4, 4)
    encoded = vlm.encode([SceneTask().example("validation", 0)])
    cache = TableCache(tmp_path)
    RewardTable.enumerate(vlm, encoded, 1, cache=cache)
    table = RewardTable.enumerate(vlm, encoded, 1, "agreement", cache=cache)
    again = RewardTable.enumerate(vlm, encoded, 1, "agreement", cache=cache)
    assert again.rewards.tolist() == table.rewards.tolist()
    full = vlm.score(encoded, encoded.full_selection(), first_token=True)
    alone = vlm.score(encoded, torch.from_numpy(table.selection(5))[None, None], reference=full.first_token)
    assert alone.agreement is not None
    assert table.rewards[5] == pytest.approx(float(alone.agreement), abs=1e-4)
    assert table.rewards.max() <= 0
