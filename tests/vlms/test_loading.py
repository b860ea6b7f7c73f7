"""Saved models are read whole or refused: no weight is ever made up."""

from __future__ import annotations

import copy
import functools
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

from agents.pruner import PRETRAINED, Pruner
from grip_env import vlms
from grip_env.vlms import TINY, hub, load_vlm
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


def test_an_adapter_alone_is_told_what_to_do(tmp_path: Path) -> None:
    """PEFT saves no config.json beside it."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(ValueError, match=r"it holds an adapter of PEFT, such as LoRA\): .* merge_and_unload\(\)"):
        load_vlm(tmp_path)


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


def change(folder: Path, name: str, *path: str, to: object) -> None:
    """Set what a JSON file holds under nested names."""
    whole = json.loads((folder / name).read_text())
    place = whole
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    (folder / name).write_text(json.dumps(whole))


CHANGES: dict[str, tuple[tuple[str, ...], object, str]] = {
    "no such type": (("config.json", "model_type"), "bert", r"model type 'bert' is not supported; .*: give a model of"),
    "many layers": (
        ("config.json", "text_config", "num_hidden_layers"),
        10**9,
        "of 1000000000 layers, and 113 tensors",
    ),
    "another text model": (("config.json", "text_config"), {"model_type": "llama"}, "weights, and 1,723,264 are saved"),
    "another tower": (("config.json", "vision_config", "hidden_size"), 10**7, "config.json describes a model of"),
    "a kernel": (("config.json", "text_config", "_attn_implementation"), "somebody/kernel", "which is code: remove"),
    "a kernel of a part": (
        ("config.json", "attn_implementation"),
        {"text_config": "somebody/kernel"},
        "names the kernel 'somebody/kernel', which is code: remove 'attn_implementation'",
    ),
    "a kernel of the whole": (("config.json", "attn_implementation"), {"": "somebody/kernel"}, "which is code: remove"),
    "a kernel deep inside": (
        ("config.json", "_attn_implementation"),
        {"vision_config": {"": "paged|somebody/kernel"}},
        r"names the kernel 'paged\|somebody/kernel', which is code: remove '_attn_implementation'",
    ),
    "another name for a kernel": (("config.json", "attribute_map"), {"x": "_attn_implementation"}, "remove 'attribute"),
    "heads": (("config.json", "vision_config", "num_attention_heads"), -1, "cannot be used"),
    "no feature layer": (("config.json", "vision_feature_layer"), 10**6, "cannot be used"),
    "no image token": (("config.json", "image_token_index"), -1, "the tokenizer does not know the image token -1"),
    "NaN": (("config.json", "text_config", "rope_parameters", "rope_theta"), 0, "gives NaN or infinities for a grey"),
    "a size": (
        ("processor_config.json", "image_processor", "size"),
        {"shortest_edge": 10**6},
        "where 16384 is the most",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_impossible_settings_are_refused_when_a_model_is_loaded(vlm_folder: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(vlm_folder, folder)
    (name, *path), value, reason = CHANGES[what]
    change(folder, name, *path, to=value)
    with pytest.raises(ValueError, match=reason) as caught:
        load_vlm(folder)
    assert "\n" not in str(caught.value)


def test_weights_outside_the_folder_and_missing_ones_are_refused(vlm_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(vlm_folder, folder)
    names = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(tmp_path / WEIGHTS)
    index = folder / "model.safetensors.index.json"
    for name, reason in (("../model.safetensors", "not a file beside it"), ("part-1.safetensors", "names, is missing")):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
        with pytest.raises(ValueError, match=reason):
            load_vlm(folder)
    index.write_text("[]")
    with pytest.raises(ValueError, match="no list of the files that hold the weights"):
        load_vlm(folder)


def test_of_several_chat_templates_the_default_is_taken(vlm_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(vlm_folder, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    several = [{"name": "default", "template": template}, {"name": "tool_use", "template": "tools"}]
    change(folder, "tokenizer_config.json", "chat_template", to=several)
    assert load_vlm(folder).prompt("what is it?") == load_vlm(vlm_folder).prompt("what is it?")


def test_what_is_no_whole_model_is_refused(random_vlm: HuggingFaceVLM) -> None:
    model, processor = copy.deepcopy(random_vlm.model), random_vlm.processor
    flags = [weight.requires_grad_(True) for weight in model.parameters()]

    class Adapted(torch.nn.Linear):
        """As the layers that PEFT puts into a model, whose wrapper may be taken off."""

    Adapted.__module__ = "peft.tuners.some.layer"
    inside = copy.deepcopy(model)
    inside.model.language_model.layers[0].self_attn.q_proj = Adapted(128, 128)
    apart = copy.deepcopy(model)
    apart.model.language_model.layers[0].to("meta")
    for unfit, reason in (
        (inside, r"call merge_and_unload\(\)"),
        (apart, "must be on one device, and are on cpu and meta"),
        (model.model, "LlavaModel has no head that predicts words: load it with AutoModelForImageTextToText"),
        (torch.compile(model), r"give the model itself, its \._orig_mod"),
        (torch.nn.DataParallel(model), r"give the model itself, its \.module"),
        (None, "got NoneType"),
    ):
        with pytest.raises(ValueError, match=reason):
            Pruner.wrap(unfit, processor, PRETRAINED / "tiny")
    for part in (None, processor.tokenizer, processor.image_processor):
        with pytest.raises(ValueError, match="expected the model's processor"):
            Pruner.wrap(model, part, PRETRAINED / "tiny")
    assert all(weight.requires_grad for weight in flags)  # what is refused stays as it was
    HuggingFaceVLM(model, processor)
    assert not any(weight.requires_grad for weight in model.parameters())


# -- hubs ----------------------------------------------------------------------------------------------------


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    class Session:
        def head(self, address: str, timeout: float) -> None:
            asked.append(address)
            raise ConnectionError

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Session)
    with pytest.raises(
        ValueError, match=r"own/model cannot be read \(there is no such folder, .* no answer .*\): give"
    ):
        load_vlm("own/model")
    assert len(asked) == 1


def test_a_model_in_the_cache_of_the_hub_loads_without_a_network(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, commit = tmp_path / "models--own--model", "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(vlm_folder, place / "snapshots" / commit)
    cached = functools.partial(hub.try_to_load_from_cache, cache_dir=tmp_path)
    monkeypatch.setattr(hub, "try_to_load_from_cache", cached)
    vlm = load_vlm("own/model")
    assert vlm.name == "model"
    assert vlm.checksum() == load_vlm(vlm_folder).checksum()


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
            with pytest.raises(ValueError, match=f"damaged, .*{name} is damaged, its digest is not .*: reinstall grip"):
                load_vlm("tiny")
            with pytest.raises(ValueError, match=f"{name} is damaged.*copy it anew, or remove SHA256SUMS"):
                load_vlm(folder)
        (folder / name).write_bytes(whole)
    for text in ("", "nonsense", (folder / "SHA256SUMS").read_text()[:-40]):
        (folder / "SHA256SUMS").write_text(text)
        with pytest.raises(ValueError, match=r"SHA256SUMS is damaged, it is no list of digests\): copy it anew"):
            load_vlm(folder)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(FileNotFoundError, match="SHA256SUMS is missing: reinstall grip-env"):
        load_vlm("tiny")
    shutil.copy(TINY / "SHA256SUMS", folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing\): reinstall grip-env"):
        load_vlm("tiny")


def test_digests_are_those_of_sha256sum(vlm_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(vlm_folder, folder)
    write_digests(folder)
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    load_vlm(folder)
