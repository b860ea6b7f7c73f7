"""Methods by name: what reports and tables are made from."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch

import grip_env
from agents.agent import ALGORITHMS
from agents.heuristics import BASELINES
from agents.heuristics.inside_llm import InsidePruner
from agents.methods import METHODS, MethodResult, find_method, methods_table, run_method
from grip_env import evaluate
from grip_env.run_folder.config import TrainOptions
from grip_env.tasks.scenes import SceneTask
from grip_env.vlms.blocks import BlockVLM
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fakes import FakeTask, FakeVLM
from tests.vlms.families.test_known import examples, make

DEEP = {"fastv", "fastv-kept", "sparsevlm-score"}
"""Those that need three layers."""
INSIDE = {name for name, one in METHODS.items() if "decoder layers" in one.needs}


def test_names_are_short_and_titles_tell_methods_apart() -> None:
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)?", name) for name in METHODS)
    titles = [one.title for one in METHODS.values()]
    assert len(set(titles)) == len(titles)
    known = {one.title: one.run for one in METHODS.values()}
    assert all(known[title] is run for title, run in BASELINES.items())


def test_unknown_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no method 'fastervlm': choose from random, uniform-grid, norm"):
        find_method("fastervlm")


def test_the_table_has_a_line_for_each_method() -> None:
    lines = methods_table().splitlines()
    assert len(lines) == len(METHODS) + 2
    assert {line.count("|") for line in lines} == {5}
    assert any(line.startswith("| `divprune` | max-min diversity | ") for line in lines)


@pytest.mark.parametrize("name", METHODS)
def test_methods_return_what_they_say(name: str, random_vlm: HuggingFaceVLM) -> None:
    encoded = random_vlm.encode([SceneTask().example("validation", 0)])
    assert METHODS[name].refusal(random_vlm, encoded) is None
    kept = torch.tensor([100])  # FastV cannot do with fewer on average
    result = run_method(METHODS[name].run, random_vlm, encoded, kept, torch.Generator().manual_seed(0))
    assert isinstance(result, MethodResult) == (METHODS[name].replaces or isinstance(METHODS[name].run, InsidePruner))
    if isinstance(result, MethodResult):
        assert result.spent["tokens"].item() <= 100
        assert result.log_likelihood.isfinite().all()
    else:
        assert result.sum().item() == 100


@pytest.mark.parametrize(("layers", "refused"), [(1, INSIDE), (2, DEEP), (4, set())])
def test_models_of_too_few_layers_are_refused(layers: int, refused: set[str]) -> None:
    vlm = grip_env.load_vlm("tiny")
    decoder = vlm.model.model.language_model
    decoder.layers = decoder.layers[:layers]
    decoder.config.num_hidden_layers = layers
    encoded = vlm.encode([SceneTask().example("validation", 0)])
    assert {name for name in INSIDE if METHODS[name].refusal(vlm, encoded) is not None} == refused


def test_what_a_model_lacks_is_said_once_and_by_name() -> None:
    without_cls, tiled = make("qwen2_vl"), make("internvl")
    expected = {
        without_cls: {"cls-attention", "visionzip", "vispruner", "oracle"} | INSIDE,
        tiled: {"cls-attention", "received-attention", "visionzip", "vispruner", "downsampled", "oracle"}
        | DEEP,  # it has two layers
    }
    for vlm, names in expected.items():
        encoded = vlm.encode(examples(2))
        reasons = {name: one.refusal(vlm, encoded) for name, one in METHODS.items()}
        assert {name for name, reason in reasons.items() if reason is not None} == names
        for name in names:
            reason = reasons[name]
            assert reason is not None
            assert reason.startswith(f"{METHODS[name].title} needs ")
            assert len(reason.splitlines()) == 1


def test_new_tokens_are_not_for_blocks_nor_is_a_question_that_nobody_asks(random_vlm: HuggingFaceVLM) -> None:
    blocks = BlockVLM(random_vlm)
    encoded = blocks.encode([FakeTask().example("train", 0)])
    refused = {name for name, one in METHODS.items() if one.refusal(blocks, encoded) is not None}
    assert refused == {"visionzip", "downsampled"} | INSIDE
    silent = dataclasses.replace(encoded, question_mask=torch.zeros_like(encoded.question_mask))
    assert METHODS["cdpruner"].refusal(FakeVLM(), silent) == "CDPruner needs a question, and there is none"


def test_the_command_and_the_readme_name_every_method_and_algorithm() -> None:
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    said = inspect.getsource(evaluate)
    for name in METHODS:
        assert re.search(rf"\b{name}\b", said), f"--policies does not tell of {name}"
        assert f"`{name}`" in readme
    for name in ALGORITHMS:
        assert re.search(rf"\b{name}\b", inspect.getsource(TrainOptions)), f"--algo does not tell of {name}"
        assert f"`{name}`" in readme
