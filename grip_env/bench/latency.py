"""Cost of pruning at LLaVA-1.5's shapes: ``python -m grip_env.benchmark latency``.

Time, memory and FLOPs are measured.

Every size of LLaVA-1.5-7B is divided by four: language model 4096 -> 1024 wide and 32 -> 8 layers deep (MLP 2.6875
times as wide: 101M parameters in its layers), CLIP-L/14 1024 -> 256 wide and 24 -> 6 deep (4.7% of the language
model's, as in the original). Not divided: 576 visual tokens, LLaVA-1.5's prompt around them, and heads of 64.
Weights are random, as time, memory and FLOPs do not depend on them: nothing is downloaded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.scorer import selector_flops
from grip_env.bench.memory import peak_bytes
from grip_env.cli import (
    check_agents_package,
    check_at_least,
    check_out,
    give_numbers,
    interruptible,
    parsed,
    print_verdicts,
)
from grip_env.common.devices import set_threads
from grip_env.common.errors import CommandError
from grip_env.common.output import progress_bar
from grip_env.vlms.flops import encoder_flops, prefill_flops

if TYPE_CHECKING:
    from agents.selectors import ScorerSelector
    from grip_env.vlms.base import Encoded
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["Config", "Row", "bars", "build", "main", "measure", "table"]

SIDE, PATCH = 336, 14
TOKENS = (SIDE // PATCH) ** 2
HEAD = 64
STAGES = ("encode", "select", "prefill", "generate")
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
QUESTION = "Is the circle left or right of the square?\nAnswer the question using a single word or phrase."
CHAT_TEMPLATE = (
    f"{{{{ bos_token }}}}{SYSTEM} USER: "
    "{% for content in messages[0]['content'] %}"
    "{% if content['type'] == 'image' %}<image>\n{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %} ASSISTANT:"
)


@dataclass
class Config:
    """Time a quarter-size LLaVA-1.5 with all visual tokens and pruned.

    The model has random weights in float32 and runs on the CPU. Prefill and end-to-end times end at the first answer
    token. Each variant runs once per round, one after another.
    """

    kept: tuple[int, ...] = (192, 128, 64)
    """Numbers of visual tokens kept, of 576; the bars apply to the smallest."""
    batch: tuple[int, ...] = (1, 4)
    """Numbers of pictures answered together; each gives a table, and the bars apply to each."""
    repeats: int = 9
    """Number of rounds; medians are taken over rounds, and ratios within a round."""
    threads: int = 0
    """Number of CPU threads; 0 leaves the choice to PyTorch."""
    new_tokens: int = 16
    """Number of tokens to decode after the first one."""
    width: int = 1024
    """Width of the language model, a multiple of 256; the vision tower's is a quarter of it."""
    layers: int = 8
    """Number of layers of the language model; the vision tower has three quarters as many."""
    out: Path | None = None
    """Folder for latency.json, with all times."""


def build(width: int, layers: int, seed: int = 0) -> tuple[HuggingFaceVLM, ScorerSelector]:
    """Return a model and a selector of the default size, both with random weights.

    The model is wrapped as :func:`grip_env.load_vlm` would.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from agents.scorer import Scorer, ScorerConfig
    from agents.selectors import ScorerSelector
    from grip_env.pretraining.embedded_models import build_tokenizer
    from grip_env.vlms.huggingface import HuggingFaceVLM

    torch.manual_seed(seed)
    # one token per word: about as many tokens as LLaVA-1.5's own tokenizer makes of the prompt
    tokenizer = build_tokenizer().train_new_from_iterator([SYSTEM, QUESTION, "\nUSER: ASSISTANT: left"] * 2, 512)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=True
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    vision = CLIPVisionConfig(
        hidden_size=width // 4,
        intermediate_size=width,
        num_hidden_layers=max(1, 3 * layers // 4),
        num_attention_heads=width // 4 // HEAD,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=width // 4,
    )
    text = LlamaConfig(
        vocab_size=max(32064 // 4, len(tokenizer)),
        hidden_size=width,
        intermediate_size=43 * width // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,  # so that answers have the requested number of tokens
        pad_token_id=tokenizer.pad_token_id,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(  # type: ignore[call-arg]  # renamed in the base class
        vision_config=vision,
        text_config=text,
        image_token_id=image,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        model.lm_head.weight[image] = 0  # so that random weights never answer with an image
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    scorer = Scorer(ScorerConfig(token_width=width, in_turn=True)).eval()
    torch.nn.init.normal_(scorer.out[1].weight)  # type: ignore[arg-type]  # not always the first tokens
    return HuggingFaceVLM(model, processor, f"LLaVA-1.5 shape, {width} x {layers}"), ScorerSelector(scorer)


# -- measured ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Costs of one variant, per picture and question of a batch."""

    kept: int | None
    """Number of visual tokens kept; ``None`` is dense, with all tokens and no selector."""
    length: int
    """Number of tokens that the language model reads: visual tokens and prompt."""
    flops: dict[str, int]
    """Counted FLOPs of "encode", "select" and "prefill"."""
    cache: int
    """Bytes of a picture's key-value cache after prefill, as the model leaves it."""
    peak: int
    """Peak bytes of the tensors made during a prefill of one picture, including the cache but not the weights."""
    times: dict[str, list[float]]
    """Milliseconds per picture in each round, for each of STAGES; "generate" is prefill and decoding together."""
    batch: int = 1
    """Number of pictures processed together."""

    @property
    def name(self) -> str:
        """Name in the table."""
        return "dense" if self.kept is None else str(self.kept)

    def first(self) -> list[float]:
        """Return the milliseconds from picture to first answer token of each round."""
        return [sum(stages) for stages in zip(*(self.times[key] for key in STAGES[:3]), strict=True)]

    def whole(self) -> list[float]:
        """Return the milliseconds from picture to last answer token of each round."""
        keys = ("encode", "select", "generate")
        return [sum(stages) for stages in zip(*(self.times[key] for key in keys), strict=True)]

    def fastest(self) -> float:
        """Return the milliseconds from picture to first answer token, with each stage's minimum.

        The minimum over rounds is the measurement least disturbed by other work.
        """
        return sum(min(self.times[key]) for key in STAGES[:3])

    def decode(self, new_tokens: int) -> float:
        """Return the median milliseconds for each token after the first."""
        pairs = zip(self.times["generate"], self.times["prefill"], strict=True)
        return statistics.median((whole - first) / new_tokens for whole, first in pairs)

    def predicted(self, dense: Row) -> float:
        """Return the FLOPs up to the first answer token as a share of dense."""
        return sum(self.flops.values()) / sum(dense.flops.values())

    def ratios(self, dense: Row) -> list[float]:
        """Return the time up to the first answer token as a share of dense, for each round."""
        return [own / full for own, full in zip(self.first(), dense.first(), strict=True)]

    def ratio(self, dense: Row) -> float:
        """Return the median over rounds of :meth:`ratios`."""
        return statistics.median(self.ratios(dense))

    def deviation(self, dense: Row) -> float:
        """Return the relative excess of the time ratio over the one that FLOPs predict."""
        return self.ratio(dense) / self.predicted(dense) - 1


def measure(
    vlm: HuggingFaceVLM, selector: ScorerSelector, kept: Sequence[int], repeats: int, new_tokens: int, batch: int = 1
) -> list[Row]:
    """Measure dense and each count of kept tokens, and return the rows, dense first.

    Each of ``repeats`` rounds runs all variants one after another, after one round that is not counted. ``batch``
    pictures of the vision tower's input size are processed together.
    """
    import numpy as np
    import torch

    from grip_env.tasks.base import Example

    pictures = np.random.default_rng(0).integers(0, 256, (batch, SIDE, SIDE, 3), dtype=np.uint8)
    examples = [Example(picture, QUESTION, "left") for picture in pictures]
    variants: list[int | None] = [None, *kept]
    generator = torch.Generator().manual_seed(0)

    def select(encoded: Encoded, count: int | None) -> torch.Tensor:
        if count is None:
            return encoded.full_selection()
        return selector(vlm, encoded, torch.full((len(encoded),), count), generator)[:, None]

    times: list[dict[str, list[float]]] = [{stage: [] for stage in STAGES} for _ in variants]
    for turn in progress_bar(range(1 + repeats), "rounds"):
        for row, count in zip(times, variants, strict=True):
            marks = [time.perf_counter()]
            encoded = vlm.encode(examples)
            marks.append(time.perf_counter())
            selection = select(encoded, count)
            marks.append(time.perf_counter())
            vlm.generate(encoded, selection, 1)
            marks.append(time.perf_counter())
            vlm.generate(encoded, selection, 1 + new_tokens)
            marks.append(time.perf_counter())
            for stage, start, end in zip(STAGES, marks, marks[1:], strict=False):
                row[stage] += [(end - start) / batch * 1e3] if turn else []

    encoded = vlm.encode(examples[:1])
    config, words = vlm.model.config, encoded.question.shape[1]
    rows = []
    for count, spent in zip(variants, times, strict=True):
        length, cache, peak = _memory(vlm, encoded, select(encoded, count))
        flops = {
            "encode": encoder_flops(config),
            "select": 0 if count is None else selector_flops(selector.scorer.config, words, TOKENS),
            "prefill": prefill_flops(config, length),
        }
        rows.append(Row(count, length, flops, cache, peak, spent, batch))
    return rows


def _memory(vlm: HuggingFaceVLM, encoded: Encoded, selection: Any) -> tuple[int, int, int]:
    """Run a prefill, and return its cache's tokens and bytes and the peak bytes of tensors."""
    caches: list[Any] = []
    hook = vlm.model.model.language_model.register_forward_hook(
        lambda module, inputs, output: caches.append(output.past_key_values)
    )
    try:
        peak = peak_bytes(lambda: vlm.generate(encoded, selection, 1))
    finally:
        hook.remove()
    layers = caches[0].layers
    return caches[0].get_seq_length(), sum(layer.keys.nbytes + layer.values.nbytes for layer in layers), peak


# -- shown ---------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], new_tokens: int) -> str:
    """Return a Markdown table of medians, in ms per picture and MB of 10^6 bytes."""
    columns: dict[str, Callable[[Row], str]] = {
        "tokens in LM": lambda row: str(row.length),
        "encode ms": lambda row: _median(row.times["encode"]),
        "select ms": lambda row: "" if row.kept is None else _median(row.times["select"]),
        "prefill ms": lambda row: _median(row.times["prefill"]),
        "end-to-end ms": lambda row: _median(row.first()),
        "speed-up": lambda row: f"{1 / row.ratio(dense):.2f}x",
        "GFLOP": lambda row: f"{sum(row.flops.values()) / 1e9:.1f}",
        "FLOP ratio": lambda row: f"{row.predicted(dense):.3f}",
        "time ratio": lambda row: f"{row.ratio(dense):.3f}",
        "deviation": lambda row: f"{row.deviation(dense):+.1%}",
        "decode ms/token": lambda row: f"{row.decode(new_tokens):.1f}",
        f"with {new_tokens} more ms": lambda row: _median(row.whole()),
        "KV MB": lambda row: f"{row.cache / 1e6:.1f}",
        "peak MB": lambda row: f"{row.peak / 1e6:.1f}",
    }
    dense = rows[0]
    lines = ["| kept | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    return "\n".join(lines + [f"| {row.name} | " + " | ".join(f(row) for f in columns.values()) + " |" for row in rows])


def _pictures(batch: int) -> str:
    return "one picture at a time" if batch == 1 else f"{batch} pictures at a time"


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f}"


def bars(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Check the two bars for the variant with the fewest tokens.

    Returns:
        For each bar, (statement with numbers, whether it holds).
    """
    dense, row = rows[0], min(rows[1:], key=lambda row: row.kept or 0)
    off, ratio, predicted = row.deviation(dense), row.ratio(dense), row.predicted(dense)
    share = statistics.median(own / total for own, total in zip(row.times["select"], row.first(), strict=True))
    name = f"{row.name} of {TOKENS} tokens, {_pictures(row.batch)}"
    time_text = f"{name}: end-to-end takes {ratio:.3f} of dense, FLOPs predict {predicted:.3f}: {off:+.1%} (within 15%)"
    share_text = f"{name}: the selector takes {share:.1%} of end-to-end (< 5%)"
    return [(time_text, abs(off) <= 0.15), (share_text, share < 0.05)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    with interruptible("interrupted; nothing was written."):
        _run(parsed(Config, "python -m grip_env.benchmark latency", arguments))


def _run(config: Config) -> None:
    check_agents_package()
    set_threads(config.threads)
    check_at_least(1, repeats=config.repeats, new_tokens=config.new_tokens, layers=config.layers)
    if not config.batch or min(config.batch) < 1:
        given = " ".join(map(str, config.batch)) or "nothing"
        raise CommandError(f"--batch must be counts of pictures from 1 up; got {given}")
    if not config.kept or min(config.kept) < 1 or max(config.kept) > TOKENS:
        given = " ".join(map(str, config.kept)) or "nothing"
        raise CommandError(f"--kept must be counts from 1 to {TOKENS}, the visual tokens of a picture; got {given}")
    if config.width < 256 or config.width % 256:
        raise CommandError(f"--width must be a multiple of 256, for heads of {HEAD} in both models; got {config.width}")
    check_out(config.out)
    import torch

    vlm, selector = build(config.width, config.layers)
    parts = {"language model": vlm.model.model.language_model, "vision tower": vlm.model.model.vision_tower}
    sizes = {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}
    shown = ", ".join(f"{name} {size / 1e6:.1f}M" for name, size in sizes.items())
    print(f"{shown}, float32, {torch.get_num_threads()} threads, medians over {config.repeats} rounds\n", flush=True)
    tables = []
    for batch in config.batch:
        rows = measure(vlm, selector, config.kept, config.repeats, config.new_tokens, batch)
        tables.append(rows)
        print(f"{_pictures(batch)}, times for each\n\n{table(rows, config.new_tokens)}\n")
        for row in rows[1:]:
            spread = sorted(row.ratios(rows[0]))
            best = row.fastest() / rows[0].fastest()
            print(
                f"{row.name}: time ratio {spread[0]:.3f} to {spread[-1]:.3f} over the rounds, "
                f"{best:.3f} of fastest stages"
            )
        print(flush=True)
    checked = print_verdicts([bar for rows in tables for bar in bars(rows)])
    numbers = {
        "threads": torch.get_num_threads(),
        "parameters": sizes,
        "rows": [asdict(row) for rows in tables for row in rows],
        "bars": checked,
    }
    give_numbers(config, numbers, "latency.json")
