"""Saved models are read whole or refused: no weight is ever made up."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grip_env import vlms
from grip_env.vlms import TINY, load_vlm
from grip_env.vlms.huggingface import HuggingFaceVLM
from grip_env.vlms.loading import write_digests

CARD = "MODEL_CARD.md"
WEIGHTS = "model.safetensors"
PROJECTOR = "multi_modal_projector.linear_1.weight"


def projector(names: Iterable[str]) -> str:
    return next(name for name in names if name.endswith(PROJECTOR))


def drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights[projector(weights)]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def reshape_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = projector(weights)
    weights[name] = weights[name][1:].clone()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no file named model.safetensors"),
    "truncated weights": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000]),
        "deserializing header",
    ),
    "a tensor missing": (drop_a_tensor, f"{PROJECTOR} for one"),
    "a tensor of another shape": (reshape_a_tensor, f"{PROJECTOR} for one"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "image processor"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json' is not a valid JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_incomplete_model_is_refused_in_one_line(vlm_folder: Path, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(vlm_folder, folder)
    load_vlm(folder)
    breaking, reason = FAULTS[fault]
    breaking(folder)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_vlm(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert reason in message
    assert message.endswith("save it again")
    assert "\n" not in message


def test_a_name_that_is_no_folder_says_what_to_give() -> None:
    with pytest.raises(
        ValueError, match=r"no-such/model cannot be read \(.*\): give a folder that save_pretrained wrote"
    ):
        load_vlm("no-such/model")


def test_an_embedded_model_that_did_not_come_along_says_reinstall(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(vlm_folder, folder)
    (folder / WEIGHTS).unlink()
    monkeypatch.setattr(vlms, "TINY", folder)
    with pytest.raises(FileNotFoundError, match=r"the embedded model is missing or damaged, .*: reinstall grip-env"):
        load_vlm()
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"the embedded model is missing or damaged, .*: reinstall grip-env"):
        load_vlm("tiny")


# -- doors ---------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


SETTINGS = ("config.json", "tokenizer_config.json", "processor_config.json")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("answer", ["y\n", ""])
def test_code_that_comes_with_a_model_is_never_run(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, answer: str
) -> None:
    """Nobody is asked either: transformers would run it for a "y" on the terminal."""
    folder, mark = tmp_path / "model", tmp_path / "was run"
    shutil.copytree(vlm_folder, folder)
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Own:\n    pass\n"
    for module in ("own.py", "custom_generate/generate.py"):
        (folder / module).parent.mkdir(exist_ok=True)
        (folder / module).write_text(code + "def generate(*args, **options):\n    pass\n")
    settings = json.loads((folder / name).read_text())
    kinds = ("AutoConfig", "AutoModelForImageTextToText", "AutoImageProcessor", "AutoProcessor")
    settings["auto_map"] = dict.fromkeys(kinds, "own.Own") | {"AutoTokenizer": ["own.Own", "own.Own"]}
    if name == "config.json":
        settings["model_type"] = "own-model"
        settings["architectures"] = ["Own"]
    (folder / name).write_text(json.dumps(settings))
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    if name == "config.json":
        with pytest.raises(ValueError, match="it needs code of its own, which is never run"):
            load_vlm(folder)
    else:  # there is a class in transformers for what asks: that is taken
        load_vlm(folder)
    assert not asked
    assert not mark.exists()


def test_pickles_are_never_opened(vlm_folder: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "was run"
    shutil.copytree(vlm_folder, folder)
    torch.save({"weight": Bomb(mark)}, folder / "pytorch_model.bin")
    load_vlm(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="its weights are pickles, which are never opened: save it as safetensors"):
        load_vlm(folder)
    assert not mark.exists()


def test_adapters_and_quantised_models_are_told_what_to_do(vlm_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(vlm_folder, folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(ValueError, match=r"it holds an adapter of PEFT, such as LoRA\): .* merge_and_unload\(\)"):
        load_vlm(folder)
    (folder / "adapter_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for settings in ({"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_4bit": True}):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(
            ValueError, match=rf"it is quantised \({settings['quant_method']}\): install what that needs"
        ):
            load_vlm(folder)


def test_models_with_adapters_that_are_not_merged_are_refused(random_vlm: HuggingFaceVLM) -> None:
    class Wrapped(torch.nn.Module):
        """Hands on what it does not have itself, as PEFT's wrapper does."""

        def __init__(self) -> None:
            super().__init__()
            self.inside = random_vlm.model

        def __getattr__(self, name: str) -> object:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inside, name)

        def merge_and_unload(self) -> torch.nn.Module:
            return self.inside

    with pytest.raises(ValueError, match=r"not merged into its weights: call merge_and_unload\(\)"):
        HuggingFaceVLM(Wrapped(), random_vlm.processor)
    HuggingFaceVLM(Wrapped().merge_and_unload(), random_vlm.processor)
    with pytest.raises(ValueError, match="expected an image-text model of transformers, got DataParallel"):
        HuggingFaceVLM(torch.nn.DataParallel(random_vlm.model), random_vlm.processor)


def test_damaged_tokenizers_templates_and_processors_are_refused(vlm_folder: Path, tmp_path: Path) -> None:
    for number, (name, text) in enumerate(
        [
            ("tokenizer.json", "{"),
            ("tokenizer.json", "[]"),
            ("tokenizer.json", '{"model": 3}'),
            ("tokenizer_config.json", "[1]"),
            ("tokenizer_config.json", '{"extra_special_tokens": 5}'),
            ("chat_template.jinja", "{% for message in"),
            ("chat_template.jinja", "{{ raise_exception('no') }}"),
            ("chat_template.jinja", "{{ messages[7].content }}"),
            ("chat_template.jinja", "hello"),
            ("chat_template.jinja", "{% for m in messages %}{% for c in m.content %}<image>{% endfor %}{% endfor %}"),
            ("processor_config.json", "[]"),
            ("processor_config.json", "{}"),
            (
                "processor_config.json",
                '{"image_processor": {"image_processor_type": "CLIPImageProcessor", "size": -1}}',
            ),
            ("config.json", "[]"),
            ("config.json", '{"model_type": 3}'),
            ("config.json", '{"model_type": "llava", "text_config": 5}'),
        ]
    ):
        folder = tmp_path / f"model{number}"
        shutil.copytree(vlm_folder, folder)
        assert (folder / name).is_file()
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match="model") as caught:
            load_vlm(folder)
        assert "\n" not in str(caught.value), (name, text)


# -- digests -------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_embedded_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(TINY, folder)
    monkeypatch.setattr(vlms, "TINY", folder)
    load_vlm("tiny")
    listed = (folder / "SHA256SUMS").read_text().split()[1::2]
    assert sorted(listed) == sorted(path.name for path in TINY.iterdir() if path.name not in ("SHA256SUMS", CARD))
    for name in listed:
        whole = (folder / name).read_bytes()
        for place in random.Random(name).sample(range(len(whole)), 5):
            damaged = bytearray(whole)
            damaged[place] ^= 4
            (folder / name).write_bytes(damaged)
            with pytest.raises(FileNotFoundError, match=f"{name} is damaged, its digest is not that in SHA256SUMS"):
                load_vlm("tiny")
            with pytest.raises(ValueError, match=f"{name} is damaged.*copy it anew, or remove SHA256SUMS"):
                load_vlm(folder)
        (folder / name).write_bytes(whole)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load_vlm("tiny")


def test_digests_are_those_of_sha256sum(vlm_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(vlm_folder, folder)
    write_digests(folder)
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    load_vlm(folder)
