"""The latency benchmark on a model of a few million parameters: what is counted and shown, never how long it took."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from agents.selectors import ScorerSelector
from grip_env import benchmark
from grip_env.bench import latency
from grip_env.bench.memory import peak_bytes
from grip_env.tasks.base import Example
from grip_env.vlms import flops
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.test_commands import finish, refusal, start

KEPT = (192, 64)


@pytest.fixture(scope="module")
def built() -> tuple[HuggingFaceVLM, ScorerSelector]:
    return latency.build(width=256, layers=4)


@pytest.fixture(scope="module")
def measured(built: tuple[HuggingFaceVLM, ScorerSelector]) -> list[latency.Row]:
    return latency.measure(*built, KEPT, repeats=2, new_tokens=3)


def counted(work: Callable[[], Any]) -> tuple[int, Any]:
    """FLOPs PyTorch sees in ``work``; fused kernels, which it does not look into on a CPU, are left aside."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops(), result


def test_formulas_count_what_pytorch_counts(
    built: tuple[HuggingFaceVLM, ScorerSelector], measured: list[latency.Row]
) -> None:
    vlm, selector = built
    picture = np.zeros((336, 336, 3), dtype=np.uint8)
    seen, encoded = counted(lambda: vlm.encode([Example(picture, latency.QUESTION, "left")]))
    assert seen == pytest.approx(measured[0].flops["encode"], rel=0.01)
    kept = torch.tensor([64])
    seen, selection = counted(lambda: selector(vlm, encoded, kept, torch.Generator()))
    assert seen == pytest.approx(measured[2].flops["select"], rel=0.01)
    seen, _ = counted(lambda: vlm.generate(encoded, selection[:, None], 1))
    assert seen == pytest.approx(measured[2].flops["prefill"], rel=0.01)
    seen, _ = counted(lambda: vlm.generate(encoded, encoded.full_selection(), 1))
    assert seen == pytest.approx(measured[0].flops["prefill"], rel=0.01)
    assert measured[0].flops["select"] == 0


def test_lengths_and_caches_are_the_models_own(
    built: tuple[HuggingFaceVLM, ScorerSelector], measured: list[latency.Row]
) -> None:
    words = measured[0].length - 576
    assert 40 < words < 80  # LLaVA-1.5's prompt around the picture
    assert [row.length - words for row in measured] == [576, 192, 64]
    for row in measured:
        assert row.cache == flops.cache_bytes(built[0].model.config, row.length)
        assert row.peak > row.cache
    assert measured[0].peak > measured[1].peak > measured[2].peak


def test_peak_is_of_what_is_held_at_one_time() -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(1000, 1000)
        second = first + 1  # both live: 8 MB
        del first
        return second + 1  # again two at a time

    assert peak_bytes(work) == pytest.approx(8e6, rel=0.01)


def test_sizes_are_those_of_llava_divided_by_four() -> None:
    config = latency.Config()
    model = latency.build(config.width, config.layers)[0].model
    language = sum(weight.numel() for weight in model.model.language_model.layers.parameters())
    tower = sum(weight.numel() for weight in model.model.vision_tower.parameters())
    assert language > 100e6
    assert tower / language == pytest.approx(304e6 / 6.48e9, rel=0.1)  # CLIP-L/14, the layers of Llama-7B
    text = model.config.text_config
    assert text.intermediate_size / text.hidden_size == 11008 / 4096


def test_answers_have_as_many_tokens_as_asked_for(built: tuple[HuggingFaceVLM, ScorerSelector]) -> None:
    vlm, _ = built
    encoded = vlm.encode([Example(np.zeros((336, 336, 3), dtype=np.uint8), latency.QUESTION, "left")])
    lengths: list[int] = []
    hook = vlm.model.lm_head.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    vlm.generate(encoded, encoded.full_selection(), 9)
    hook.remove()
    assert lengths == [1] * 9


def test_numbers_of_the_table_belong_together(measured: list[latency.Row]) -> None:
    dense, *pruned = measured
    assert [row.name for row in measured] == ["dense", "192", "64"]
    assert all(len(times) == 2 and min(times) > 0 for row in measured for times in row.times.values())
    for row in pruned:
        ratio = statistics.median(own / full for own, full in zip(row.first(), dense.first(), strict=True))
        assert row.ratio(dense) == ratio
        assert row.predicted(dense) == pytest.approx(sum(row.flops.values()) / sum(dense.flops.values()))
        assert min(row.first()) >= row.fastest() > 0
        assert row.deviation(dense) == pytest.approx(ratio / row.predicted(dense) - 1)
        assert row.first()[0] == pytest.approx(sum(row.times[key][0] for key in ("encode", "select", "prefill")))
        assert row.whole()[0] == pytest.approx(row.first()[0] - row.times["prefill"][0] + row.times["generate"][0])
    head, rule, *lines = latency.table(measured, new_tokens=3).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert {len(row) for row in cells} == {len(rule.strip("|").split("|"))}
    assert [row[0] for row in cells] == ["kept", "dense", "192", "64"]
    columns = cells[0]
    assert float(cells[3][columns.index("time ratio")]) == pytest.approx(pruned[1].ratio(dense), abs=6e-4)
    assert float(cells[3][columns.index("speed-up")][:-1]) == pytest.approx(1 / pruned[1].ratio(dense), abs=6e-3)
    assert float(cells[1][columns.index("time ratio")]) == 1


def row(kept: int | None, flop: int, times: tuple[float, float, float]) -> latency.Row:
    stages = dict(zip(latency.STAGES, ([value] for value in (*times, 9.0)), strict=True))
    return latency.Row(kept, 600, {"prefill": flop}, 1, 1, stages)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((10.0, 0.5, 12.0), [True, True]),  # 22.5 of 100, predicted 20
        ((10.0, 0.5, 13.0), [False, True]),
        ((9.0, 2.0, 9.0), [True, False]),
        ((5.0, 0.1, 5.0), [False, True]),  # faster than predicted is not as predicted either
    ],
)
def test_bars_are_held_against_the_fewest_tokens(times: tuple[float, float, float], expected: list[bool]) -> None:
    rows = [row(None, 1000, (10.0, 0.0, 90.0)), row(64, 200, times), row(128, 200, (99.0, 99.0, 99.0))]
    assert [holds for _, holds in latency.bars(rows)] == expected
    assert all(text.startswith("64 of 576 tokens") for text, _ in latency.bars(rows))


@pytest.mark.slow
def test_command_prints_table_and_bars_and_writes_json(tmp_path: Path) -> None:
    size = (
        "--width",
        "256",
        "--layers",
        "4",
        "--repeats",
        "1",
        "--new-tokens",
        "2",
        "--threads",
        "1",
        "--batch",
        "1",
        "2",
    )
    command = ("-m", "grip_env.benchmark", "latency", *size, "--kept", "128", "64", "--out", "new")
    code, out, err = finish(start(*command, cwd=tmp_path))
    assert code == ("MISSED" in out), err
    assert "USDT" not in err
    lines = out.splitlines()
    head = ["kept", "---"]
    cells = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert cells == [*head, "dense", "128", "64"] * 2
    verdicts = [line for line in lines if line.startswith(("holds   ", "MISSED  "))]
    assert len(verdicts) == 4
    assert all("one picture at a time" in line for line in verdicts[:2])
    assert all("2 pictures at a time" in line for line in verdicts[2:])
    saved = json.loads((tmp_path / "new" / "latency.json").read_text())
    assert saved["config"]["kept"] == [128, 64]
    assert [(row["batch"], row["kept"]) for row in saved["rows"]] == [(b, k) for b in (1, 2) for k in (None, 128, 64)]
    one, several = saved["rows"][:3], saved["rows"][3:]
    for key in ("length", "flops", "cache"):  # of one picture, however many go through together
        assert [row[key] for row in one] == [row[key] for row in several]
    assert saved["threads"] == 1
    assert len(saved["bars"]) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--kept 64 577", "--kept must be counts from 1 to 576"),
        ("--kept 0", "--kept must be counts from 1 to 576"),
        ("--kept", "got nothing"),
        ("--batch 0", "--batch must be counts of pictures from 1 up; got 0"),
        ("--batch", "got nothing"),
        ("--repeats 0", "--repeats must be at least 1; got 0"),
        ("--new-tokens 0", "--new-tokens must be at least 1; got 0"),
        ("--layers 0", "--layers must be at least 1; got 0"),
        ("--threads -1", "--threads must be at least 0; got -1"),
        ("--width 300", "--width must be a multiple of 256"),
        (f"--out {__file__}", "is not a folder; choose another folder"),
    ],
)
def test_bad_options_end_with_one_line(
    options: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "latency", *options.split()])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    assert said in refusal(stop.value, capsys)


def test_help_of_the_benchmark_names_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    assert stop.value.code == 0
    assert "grip_env.benchmark latency" in " ".join(capsys.readouterr().out.replace("│", " ").split())
