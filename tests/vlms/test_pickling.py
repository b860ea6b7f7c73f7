"""Models survive pickling, before and after transformers has put its hooks on them, into processes of any kind."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from typing import Any

import pytest
import torch

from grip_env.vlms import load_vlm
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.vlms.families.test_known import FAMILIES, examples, make, subsets


@pytest.fixture(scope="module", params=[*sorted(FAMILIES), "tiny"])
def vlm(request: pytest.FixtureRequest) -> HuggingFaceVLM:
    """Of every family and the embedded one; no other test has used it."""
    kind = str(request.param)
    return copy.copy(load_vlm("tiny")) if kind == "tiny" else make(kind)  # type: ignore[return-value]


def answers(vlm: HuggingFaceVLM) -> dict[str, torch.Tensor]:
    """What can be asked of a model."""
    encoded = vlm.encode(examples(2))
    scores = vlm.score(encoded, subsets(encoded, (1, 3)), first_token=True)
    assert scores.first_token is not None
    found = {"tokens": encoded.tokens, "likelihood": scores.log_likelihood, "first": scores.first_token}
    for kind in ("cls", "received"):
        try:
            found[kind] = vlm.attention(encoded, kind)
        except NotImplementedError:
            continue
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def hooks(vlm: HuggingFaceVLM) -> list[Any]:
    return [hook for module in vlm.model.modules() for hook in module._forward_hooks.values()]


def test_copies_answer_as_the_model_does_before_and_after_it_is_used(vlm: HuggingFaceVLM) -> None:
    fresh = pickle.loads(pickle.dumps(vlm))
    expected = answers(vlm)
    used, before = pickle.loads(pickle.dumps(vlm)), hooks(vlm)
    assert hooks(vlm) == before  # what is pickled is another tree of modules
    assert not hooks(used)
    for twin in (fresh, used, pickle.loads(pickle.dumps(used))):
        assert twin.checksum() == vlm.checksum()
        assert_equal(answers(twin), expected)
        assert len(hooks(twin)) == len(before)  # put on when they were needed
        assert not any(weight.requires_grad for weight in twin.model.parameters())
        tied = [len(list(each.model.parameters())) for each in (twin, vlm)]
        assert tied[0] == tied[1]
        assert twin.family.model is twin.model
    assert_equal(answers(vlm), expected)


def test_pickling_takes_no_memory_for_weights(vlm: HuggingFaceVLM) -> None:
    twin, model = vlm.__getstate__()["model"], vlm.model
    assert twin is not model
    for kind in ("parameters", "buffers"):
        pairs = zip(getattr(twin, kind)(), getattr(model, kind)(), strict=True)
        assert all(one is other for one, other in pairs)


def test_hooks_of_others_are_left_to_pickle_or_not() -> None:
    vlm = make("llava")
    vlm.model.register_forward_hook(seen)
    assert hooks(pickle.loads(pickle.dumps(vlm))) == [seen]
    vlm.model.register_forward_hook(lambda *_: None)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(vlm)


def seen(module: Any, inputs: Any, output: Any) -> None:
    """A hook that pickles."""


def answers_there(stored: bytes, queue: Any) -> None:
    queue.put({key: value.numpy() for key, value in answers(pickle.loads(stored)).items()})


@pytest.mark.slow
def test_a_process_that_never_built_a_model_gets_the_same_answers() -> None:
    vlm = make("llava")
    expected = answers(vlm)
    assert "cls" in expected
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=answers_there, args=(pickle.dumps(vlm), queue), daemon=True)
    process.start()
    found = queue.get(timeout=300)
    process.join()
    assert_equal({key: torch.from_numpy(value) for key, value in found.items()}, expected)
