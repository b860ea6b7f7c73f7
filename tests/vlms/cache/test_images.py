"""The cache of encoded images: the same results, no stale or damaged entry ever used, and never in the way."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from grip_env.tasks.scenes import SceneTask
from grip_env.vlms import load_vlm
from grip_env.vlms.cache import image_entries
from grip_env.vlms.cache.image_entries import LANGUAGE, encoder_digest, picture_key, picture_scope
from grip_env.vlms.cache.images import CacheStatistics, PictureCache
from grip_env.vlms.families.base import Picture
from grip_env.vlms.families.known import FAMILIES, LlavaFamily
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.vlms import tiny_models
from tests.vlms.families.test_known import SIZES, examples, image, make, subsets

KINDS = ("gemma3", "llava", "llava_next", "qwen3_vl", "smolvlm")


def picture(seed: int = 0, tokens: int = 6) -> Picture:
    generator = torch.Generator().manual_seed(seed)
    return Picture(
        torch.randn(tokens, 4, generator=generator), torch.rand(tokens, 2, generator=generator), "<image>", [tokens]
    )


def key(seed: int) -> str:
    return picture_key("scope", np.array([seed]))


def entries(cache: PictureCache) -> dict[str, int]:
    """Return the keys and sizes of what is in the folder."""
    return {path.stem: path.stat().st_size for path in cache.folder.glob("??/*.safetensors")}


def room_for(count: int, folder: Path) -> PictureCache:
    """Return an empty cache that holds ``count`` entries of :func:`picture`, and its size for one."""
    return PictureCache(folder, count * len(image_entries.pack(key(0), picture())))


def same(one: Any, other: Any) -> None:
    """Assert that two pictures or two batches are equal in every bit, or both None where there is nothing."""
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == getattr(other, name).dtype
            assert value.equal(getattr(other, name)), name
        elif name != "examples":
            assert value == getattr(other, name), name


def watch(vlm: HuggingFaceVLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of images of every call of the vision encoder."""
    calls: list[int] = []
    encode = vlm.family.pictures

    def pictures(images: Any) -> list[Picture]:
        calls.append(len(images))
        return encode(images)

    monkeypatch.setattr(vlm.family, "pictures", pictures)
    return calls


# -- the same results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_results_have_the_same_bits_with_and_without(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, batch = make(kind), examples()
    expected = plain.encode(batch)
    selection = subsets(expected)
    scores = plain.score(expected, selection)
    vlm = make(kind, cache=PictureCache(tmp_path))
    calls = watch(vlm, monkeypatch)
    for hits in (0, 4, 8):
        found = vlm.encode(batch)
        same(found, expected)
        assert vlm.score(found, selection).log_likelihood.equal(scores.log_likelihood)
        assert dataclasses.replace(vlm.cache.statistics, bytes=0) == CacheStatistics(hits=hits, misses=4)
    assert calls == [4]
    assert vlm.generate(found, selection, 3) == plain.generate(expected, selection, 3)
    other = make(kind, cache=PictureCache(tmp_path))
    calls = watch(other, monkeypatch)
    same(other.encode(batch[::-1])[[3, 2, 1, 0]], expected)
    assert (calls, other.cache.statistics.hits) == ([], 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_runs_on_each_missing_image_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, vlm, batch = make(kind), make(kind, cache=PictureCache(tmp_path)), examples()
    calls = watch(vlm, monkeypatch)
    again = dataclasses.replace(batch[3], question="what is it?", image=batch[3].image.copy())
    rows = [batch[0], batch[3], batch[1], again, batch[2], batch[3]]
    vlm.encode(batch[:2])
    found, expected = vlm.encode(rows), plain.encode(rows)
    assert calls == [2, 2]
    assert (vlm.cache.statistics.hits, vlm.cache.statistics.misses) == (2, 4)
    for name in ("tokens", "positions", "deepstack"):
        if getattr(expected, name) is None:
            assert getattr(found, name) is None
        else:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=0)
    for name in ("input_ids", "position_ids", "token_mask", "question"):
        assert getattr(found, name).equal(getattr(expected, name))
    selection = subsets(expected)
    torch.testing.assert_close(
        vlm.score(found, selection).log_likelihood,
        plain.score(expected, selection).log_likelihood,
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_pictures_come_back_whole_in_every_family(kind: str, tmp_path: Path) -> None:
    vlm, cache = make(kind), PictureCache(tmp_path)
    vlm.model.to(torch.bfloat16)
    with torch.no_grad():
        made = vlm.family.pictures([image(size) for size in SIZES])
    for number, one in enumerate(made):
        cache.put(key(number), one)
    assert made[0].tokens.dtype == torch.bfloat16
    for number, one in enumerate(made):
        found = cache.get(key(number))
        assert found is not None
        same(one, found)
        assert (found.deepstack is None, found.grid is None) == (one.deepstack is None, one.grid is None)


def test_tensors_that_are_read_go_where_the_model_is(tmp_path: Path) -> None:
    cache = PictureCache(tmp_path)
    images = [image(SIZES[0]), image(SIZES[1])]
    cache.pictures(
        "scope", images, lambda missing: [picture(seed) for seed in range(len(missing))], torch.device("cpu")
    )

    def encode(missing: list[np.ndarray]) -> list[Picture]:
        raise AssertionError("nothing is missing")

    for found in cache.pictures("scope", images, encode, torch.device("meta")):
        assert found.tokens.device.type == found.positions.device.type == "meta"


def test_a_loaded_model_takes_a_cache(tmp_path: Path) -> None:
    folder = tiny_models.save("qwen2_vl", tmp_path / "one")
    shutil.copytree(folder, tmp_path / "two")
    batch = examples(2)
    expected = load_vlm(folder).encode(batch)
    for number, name in enumerate(("one", "two")):  # the same model, whatever its folder is called
        vlm = load_vlm(tmp_path / name, cache=PictureCache(tmp_path / "cache"))
        same(vlm.encode(batch), expected)
        assert vlm.cache.statistics.hits == 2 * number


# -- what a key depends on -------------------------------------------------------------------------------


def change_vision(vlm: HuggingFaceVLM) -> None:
    weight = next(value for name, value in vlm.model.named_parameters() if "vision" in name)
    weight.flatten()[0] += 1e-3


def change_projector(vlm: HuggingFaceVLM) -> None:
    weight = next(value for name, value in vlm.model.named_parameters() if "projector" in name)
    weight.flatten()[0] += 1e-3


def change_class(vlm: HuggingFaceVLM) -> None:
    processor = vlm.processor.image_processor
    processor.__class__ = type("Other", (type(processor),), {"to_json_string": type(processor).to_json_string})


CHANGES: dict[str, Callable[[HuggingFaceVLM], Any]] = {
    "vision weight": change_vision,
    "projector weight": change_projector,
    "processor size": lambda vlm: setattr(vlm.processor.image_processor, "size", {"shortest_edge": 40}),
    "processor mean": lambda vlm: setattr(vlm.processor.image_processor, "image_mean", [0.5, 0.5, 0.5]),
    "processor resampling": lambda vlm: setattr(vlm.processor.image_processor, "resample", 2),
    "processor setting that is not saved": lambda vlm: setattr(
        vlm.processor.image_processor, "default_to_square", not vlm.processor.image_processor.default_to_square
    ),
    "processor class": change_class,
    "precision": lambda vlm: vlm.model.to(torch.bfloat16),
    "attention": lambda vlm: vlm.model.set_attn_implementation("eager"),
    "attention of the tower": lambda vlm: vlm.model.model.vision_tower.set_attn_implementation("eager"),
    "feature layer": lambda vlm: setattr(vlm.model.config, "vision_feature_layer", -1),
    "family": lambda vlm: setattr(vlm.family, "__class__", FAMILIES["gemma3"].__mro__[1]),
}


def scope(vlm: HuggingFaceVLM) -> str:
    return picture_scope(vlm.family, encoder_digest(vlm.model))


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_whatever_pictures_depend_on_changes_the_key(change: str) -> None:
    vlm = make("llava")
    before = scope(vlm)
    assert scope(make("llava")) == before
    CHANGES[change](vlm)
    assert scope(vlm) != before


def test_versions_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = make("llava")
    found = {scope(vlm)}
    for name, value in (("transformers.__version__", "0.1"), ("torch.__version__", "0.1"), ("PIL.__version__", "0.1")):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            found.add(scope(vlm))
    with monkeypatch.context() as patch:
        patch.setattr(image_entries, "FORMAT", 0)
        found.add(scope(vlm))
    assert len(found) == 5


def test_images_of_other_bytes_shape_or_dtype_have_other_keys() -> None:
    one = image((4, 6))
    other = one.copy()
    other[3, 5, 2] ^= 1
    different = [one, other, one.reshape(6, 4, 3), one.view(np.int8), one[:, ::-1]]
    assert len({picture_key("scope", value) for value in different}) == len(different)
    assert picture_key("other", one) != picture_key("scope", one)
    spread = np.zeros((8, 6, 3), np.uint8)
    spread[::2] = one
    assert picture_key("scope", spread[::2]) == picture_key("scope", one)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
@torch.no_grad()
def test_pictures_do_not_depend_on_the_language_model(kind: str) -> None:
    """Which is why its weights are not in the key."""
    vlm = make(kind)
    images, before = [image(size) for size in SIZES], encoder_digest(vlm.model)
    expected = vlm.family.pictures(images)
    state = vlm.model.state_dict()
    language = [value for name, value in state.items() if name.startswith(LANGUAGE)]
    assert 0 < len(language) < len(state)
    for value in language:
        value.fill_(torch.nan)
    for one, other in zip(expected, vlm.family.pictures(images), strict=True):
        same(one, other)
    assert encoder_digest(vlm.model) == before


@torch.no_grad()
def test_another_model_or_processor_in_the_same_folder_is_never_mixed_up(tmp_path: Path) -> None:
    cache, batch = PictureCache(tmp_path), examples(2)
    make("llava", cache=cache).encode(batch)
    other = HuggingFaceVLM(*tiny_models.build("llava", seed=1))
    expected = other.encode(batch)
    other.cache = cache
    same(other.encode(batch), expected)
    assert (cache.statistics.hits, cache.statistics.misses) == (0, 4)
    other.processor.image_processor.image_mean = [0.1, 0.2, 0.3]  # after the weights were read
    other.cache = None
    expected = other.encode(batch)
    other.cache = cache
    same(other.encode(batch), expected)
    assert (cache.statistics.hits, cache.statistics.misses) == (0, 6)


# -- damage ----------------------------------------------------------------------------------------------


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place:][1:]


def header(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def reshaped(data: bytes) -> bytes:
    tensors = load(data)
    return save({**tensors, "tokens": tensors["tokens"].reshape(-1, 16)}, header(data)["__metadata__"])


def another_run(data: bytes) -> bytes:
    about = header(data)["__metadata__"]
    return save(load(data), {**about, "runs": "[1]"})


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit of a tensor": lambda data: flip(data, len(data) - 1),
    "a bit of the header": lambda data: flip(data, 20),
    "an endless header": lambda data: b"\xff" * 8 + data[8:],
    "half of it": lambda data: data[: len(data) // 2],
    "nothing": lambda data: b"",
    "more than it": lambda data: data + b"\0" * 8,
    "no safetensors": lambda data: b"hello" * 100,
    "other tensors": lambda data: save({"weight": torch.zeros(3)}),
    "other tensors with its digest": lambda data: save({"weight": torch.zeros(3)}, header(data)["__metadata__"]),
    "another shape": reshaped,
    "another text": another_run,
    "another image": lambda data: image_entries.pack(key(1), picture(1)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entries_are_encoded_anew(damage: str, tmp_path: Path, tiny_llava: HuggingFaceVLM) -> None:
    batch = examples(2)
    expected = tiny_llava.encode(batch)
    cache = PictureCache(tmp_path)
    vlm = HuggingFaceVLM(tiny_llava.model, tiny_llava.processor, cache=cache)
    vlm.encode(batch)
    path = sorted(tmp_path.glob("??/*.safetensors"))[0]
    content = path.read_bytes()
    path.write_bytes(DAMAGE[damage](content))
    assert path.read_bytes() != content
    found = vlm.encode(batch)
    torch.testing.assert_close(found.tokens, expected.tokens, atol=1e-5, rtol=0)
    now = cache.statistics
    assert (now.hits, now.misses, now.corrupt, now.failed) == (1, 3, 1, 0)
    assert vlm.encode(batch).tokens.equal(found.tokens)
    assert (cache.statistics.hits, cache.statistics.corrupt) == (3, 1)
    assert cache.statistics.bytes == sum(entries(cache).values())


@pytest.fixture(scope="module")
def tiny_llava() -> HuggingFaceVLM:
    return make("llava")


def test_no_single_wrong_bit_is_trusted(tmp_path: Path) -> None:
    cache = PictureCache(tmp_path)
    cache.put(key(0), picture(tokens=1))
    path = cache.path(key(0))
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(flip(data, place))
        assert cache.get(key(0)) is None, place
        assert not path.exists()
    assert cache.statistics.corrupt == len(data)
    path.write_bytes(data)
    assert cache.get(key(0)) is not None


# -- room ------------------------------------------------------------------------------------------------


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = room_for(4, tmp_path)
    for seed in range(4):
        cache.put(key(seed), picture(seed))
    assert cache.get(key(0)) is not None
    assert set(entries(cache)) == {key(seed) for seed in range(4)}
    cache.put(key(4), picture(4))  # down to 90 % of 4 entries, the new one among them
    assert set(entries(cache)) == {key(0), key(3), key(4)}
    assert cache.statistics.evicted == 2
    same(cache.get(key(0)), picture(0))


def test_the_bound_holds_after_every_write(tmp_path: Path) -> None:
    cache = room_for(7, tmp_path)
    for seed in range(40):
        cache.put(key(seed), picture(seed, tokens=1 + seed % 6))
        sizes = entries(cache)
        assert key(seed) in sizes
        assert sum(sizes.values()) <= cache.max_bytes
    now = cache.statistics
    assert now.bytes == sum(sizes.values())
    assert now.evicted == 40 - len(sizes)
    assert now.failed == 0


def test_a_folder_that_is_too_full_is_emptied_at_the_first_write(tmp_path: Path) -> None:
    for seed in range(10):
        PictureCache(tmp_path).put(key(seed), picture(seed))
    cache = room_for(5, tmp_path)
    assert cache.statistics.bytes == 2 * cache.max_bytes
    cache.put(key(10), picture(10))
    assert set(entries(cache)) == {key(7), key(8), key(9), key(10)}


def test_what_others_write_counts(tmp_path: Path) -> None:
    caches = [room_for(30, tmp_path) for _ in range(3)]
    entry = caches[0].max_bytes // 30
    for seed in range(120):
        caches[seed % 3].put(key(seed), picture(seed))
        assert sum(entries(caches[0]).values()) <= caches[0].max_bytes + 2 * (caches[0].max_bytes // 20 + entry)
    assert sum(cache.statistics.evicted for cache in caches) == 120 - len(entries(caches[0]))


def test_the_folder_is_not_listed_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listings = []
    find = PictureCache._list
    monkeypatch.setattr(PictureCache, "_list", lambda self: listings.append(1) or find(self))
    cache = PictureCache(tmp_path)
    for seed in range(50):
        cache.put(key(seed), picture(seed))
    assert len(listings) == 1
    assert cache.statistics.bytes == sum(entries(cache).values())


def test_entries_that_vanish_while_room_is_made_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, other = room_for(4, tmp_path), PictureCache(tmp_path)
    for seed in range(4):
        cache.put(key(seed), picture(seed))
    find = PictureCache._list

    def find_and_lose(self: PictureCache) -> Any:
        found = find(self)
        other.path(key(0)).unlink()
        return found

    monkeypatch.setattr(PictureCache, "_list", find_and_lose)
    cache.put(key(4), picture(4))
    assert set(entries(cache)) == {key(2), key(3), key(4)}
    assert (cache.statistics.evicted, cache.statistics.failed) == (1, 0)


def test_an_entry_evicted_while_it_is_read_is_still_a_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PictureCache(tmp_path)
    cache.put(key(0), picture(0))
    read = Path.read_bytes

    def read_and_lose(self: Path) -> bytes:
        data = read(self)
        self.unlink()
        return data

    monkeypatch.setattr(Path, "read_bytes", read_and_lose)
    same(cache.get(key(0)), picture(0))
    assert cache.get(key(0)) is None
    now = cache.statistics
    assert (now.hits, now.misses, now.corrupt, now.failed) == (1, 1, 0, 0)


def test_only_what_the_cache_wrote_is_ever_deleted(tmp_path: Path) -> None:
    cache = room_for(2, tmp_path)
    cache.put(key(0), picture(0))
    folder = cache.path(key(0)).parent
    left = [tmp_path / "notes.txt", folder / "notes.txt", folder / "model.safetensors", tmp_path / "aa.safetensors"]
    for path in left:
        path.write_text("mine")
        os.utime(path, (1, 1))
    dead, alive = (folder / f"{key(0)}.{letter * 32}.tmp" for letter in "ab")
    for path in (dead, alive):
        path.write_text("part")
    os.utime(dead, (time.time() - 7200,) * 2)
    for seed in range(1, 6):
        cache.put(key(seed), picture(seed))
    assert cache.statistics.evicted == 4
    assert all(path.read_text() == "mine" for path in left)
    assert (dead.exists(), alive.exists()) == (False, True)


# -- trouble ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["os.replace", "pathlib.Path.write_bytes", "pathlib.Path.mkdir", "os.utime"])
def test_a_folder_that_cannot_be_written_stops_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llava: HuggingFaceVLM
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    batch = examples(3)
    expected = tiny_llava.encode(batch)
    cache = PictureCache(tmp_path / "cache")
    vlm = HuggingFaceVLM(tiny_llava.model, tiny_llava.processor, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.warns(RuntimeWarning, match=r"cannot be written \(.*No space left on device\)") as warned:
            found = [vlm.encode(batch) for _ in range(2)]
        assert len(warned) == 1
    for one in found:
        same(one, expected)
    assert cache.statistics == CacheStatistics(misses=6, failed=6)
    assert [path for path in tmp_path.glob("cache/*/*") if path.is_file()] == []
    same(vlm.encode(batch), expected)  # and once there is room it is used
    assert len(entries(cache)) == 3


def test_an_unreadable_entry_is_encoded_anew(tmp_path: Path) -> None:
    cache = PictureCache(tmp_path)
    cache.path(key(0)).mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert cache.get(key(0)) is None
    assert (cache.statistics.misses, cache.statistics.failed, cache.statistics.corrupt) == (1, 1, 0)


def test_reading_needs_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PictureCache(tmp_path).put(key(0), picture(0))

    def forbidden(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    cache = PictureCache(tmp_path)
    monkeypatch.setattr(os, "utime", forbidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(cache.get(key(0)), picture(0))
    assert (cache.statistics.hits, cache.statistics.failed) == (1, 0)


def test_an_entry_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = room_for(1, tmp_path)
    cache.put(key(0), picture(0))
    with pytest.warns(RuntimeWarning, match="larger than the whole cache"):
        cache.put(key(1), picture(1, tokens=100))
    assert set(entries(cache)) == {key(0)}
    assert (cache.statistics.failed, cache.statistics.evicted) == (1, 0)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        PictureCache(tmp_path / "file")
    with pytest.raises(ValueError, match="max_bytes must be positive, not 0"):
        PictureCache(tmp_path, 0)


# -- company ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_share_the_folder_and_count_for_themselves(
    duplicate: Callable[[PictureCache], PictureCache], tmp_path: Path
) -> None:
    cache = PictureCache(tmp_path, 12345)
    cache.put(key(0), picture(0))
    other = duplicate(cache)
    assert (other.folder, other.max_bytes) == (tmp_path, 12345)
    same(other.get(key(0)), picture(0))
    other.put(key(1), picture(1))
    same(cache.get(key(1)), picture(1))
    assert (cache.statistics.hits, other.statistics.hits) == (1, 1)


def test_statistics_are_told_in_one_line(tmp_path: Path) -> None:
    cache = room_for(2, tmp_path)
    cache.get(key(0))
    for seed in (0, 1, 2):
        cache.put(key(seed), picture(seed))
        cache.get(key(seed))
    line = cache.describe()
    assert line.startswith(
        f"image cache {tmp_path}: 3 hits, 1 misses (75% hits), 0 corrupt, 2 evicted, 0 failed, 0.0 of"
    )


def test_threads_lose_no_count(tmp_path: Path) -> None:
    cache = room_for(6, tmp_path)
    wrong: list[int] = []

    def work(first: int) -> None:
        for step in range(100):
            seed = (first + step * 7) % 12
            found = cache.get(key(seed))
            if found is None:
                cache.put(key(seed), picture(seed))
            elif not found.tokens.equal(picture(seed).tokens):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    now = cache.statistics
    assert wrong == []
    assert now.hits + now.misses == 400
    assert (now.corrupt, now.failed) == (0, 0)
    assert now.evicted > 0
    assert now.hits > 0


WORKER = """
import dataclasses, json, random, sys, time
from pathlib import Path
import numpy as np, torch
from grip_env.vlms.cache.images import PictureCache
from grip_env.vlms.cache.image_entries import picture_key
from grip_env.vlms.families.base import Picture

me, folder, max_bytes = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
statistics = []
if me == 0:
    from grip_env.vlms import load_vlm
    from grip_env.tasks.scenes import SceneTask
    vlm = load_vlm(cache=PictureCache(folder / "model"))
    torch.save(vlm.encode([SceneTask().example("test", index) for index in range(3)]).tokens, folder / "tokens.pt")
    statistics.append(dataclasses.asdict(vlm.cache.statistics))
cache = PictureCache(folder / "shared", max_bytes)
(folder / f"ready-{me}").touch()
deadline = time.monotonic() + 100
while len(list(folder.glob("ready-*"))) < 2 and time.monotonic() < deadline:
    time.sleep(0.001)
luck = random.Random(me)
for _ in range(500):
    seed = luck.randrange(24)
    key = picture_key("scope", np.array([seed]))
    picture = Picture(torch.full((6, 4), float(seed)), torch.zeros(6, 2), "<image>", [6])
    found = cache.get(key)
    if found is None:
        cache.put(key, picture)
    else:
        assert found.tokens.equal(picture.tokens)
statistics.append(dataclasses.asdict(cache.statistics))
print(json.dumps(statistics))
"""


@pytest.mark.slow
def test_two_processes_write_and_evict_at_once(tmp_path: Path) -> None:
    vlm = load_vlm(cache=PictureCache(tmp_path / "model"))
    expected = vlm.encode([SceneTask().example("test", index) for index in range(3)])
    shared = room_for(10, tmp_path / "shared")
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error::RuntimeWarning", "-c", WORKER, *map(str, (me, tmp_path, shared.max_bytes))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
            env={**os.environ, "PYTHONHASHSEED": str(me + 1), "HF_HUB_OFFLINE": "1"},
        )
        for me in range(2)
    ]
    statistics = []
    for worker in workers:
        output, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
        statistics += [CacheStatistics(**values) for values in json.loads(output.splitlines()[-1])]
    of_model, *of_shared = statistics
    assert (of_model.hits, of_model.misses) == (3, 0)
    assert torch.load(tmp_path / "tokens.pt").equal(expected.tokens)
    for one in of_shared:
        assert one.hits + one.misses == 500
        assert (one.corrupt, one.failed) == (0, 0)
        assert min(one.evicted, one.hits) > 0
    sizes = entries(shared)
    entry = shared.max_bytes // 10
    assert 0 < sum(sizes.values()) <= shared.max_bytes + shared.max_bytes // 20 + entry
    for seed in range(24):
        found = shared.get(key(seed))
        assert (found is not None) == (key(seed) in sizes)
        assert found is None or found.tokens.equal(torch.full((6, 4), float(seed)))
    assert list(tmp_path.glob("shared/*/*.tmp")) == []


def test_keys_stay_when_the_class_of_a_family_moves(
    tiny_llava: HuggingFaceVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users' caches are addressed by these names: whatever is moved or renamed, they stay."""
    names = {kind.key for kind in FAMILIES.values()}
    assert names == {
        f"grip_env.vlms.families.{name}Family"
        for name in ("Llava", "TiledLlava", "Qwen", "Qwen3", "Split", "InternVL", "PaliGemma", "Gemma3")
    }
    assert len(names) == len(set(FAMILIES.values()))
    before = picture_scope(tiny_llava.family, "weights")
    monkeypatch.setattr(type(tiny_llava.family), "__module__", "somewhere.else")
    assert picture_scope(tiny_llava.family, "weights") == before

    class Own(LlavaFamily):
        """A user's own family computes something else, whatever it inherits."""

    own = Own(tiny_llava.model, tiny_llava.processor)
    assert picture_scope(own, "weights") != before
