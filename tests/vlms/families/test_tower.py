"""What vision towers attend to, worked out by hand, and images that are made smaller."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agents.heuristics import VisPruner
from grip_env.vlms.blocks import BlockVLM
from grip_env.vlms.families.base import grid_within, shrink
from grip_env.vlms.families.known import FAMILIES
from grip_env.vlms.families.tower import layer_index
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.vlms.families.test_known import examples, make

ATTENDED = ("gemma3", "llava", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
QWEN = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
SHRINKING = ("llava", "paligemma", *QWEN)


def weights_by_hand(vlm: HuggingFaceVLM, layer: int, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention weights (heads, n, n) of one layer of a CLIP or SigLIP tower, and its keys (heads, n, w)."""
    tower = vlm.model.model.vision_tower
    pixels = vlm.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    states: list[torch.Tensor] = []
    block = next(part for name, part in tower.named_modules() if name.endswith("encoder.layers"))[layer]
    handle = block.register_forward_pre_hook(
        lambda module, args, named: states.append(args[0] if args else named["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        tower(pixels)
        handle.remove()
        x = block.layer_norm1(states[0][0])  # (n, W)
        queries, keys = block.self_attn.q_proj(x), block.self_attn.k_proj(x)
    heads = tower.config.num_attention_heads
    size = queries.shape[1] // heads
    split = [slice(head * size, head * size + size) for head in range(heads)]
    weights = [(queries[:, part] @ keys[:, part].T / math.sqrt(size)).softmax(1) for part in split]
    return torch.stack(weights), torch.stack([keys[:, part] for part in split])


# -- received attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "layer", "skipped"), [("llava", -2, 1), ("paligemma", -1, 0)])
def test_received_attention_is_the_mean_over_heads_and_patches(kind: str, layer: int, skipped: int) -> None:
    vlm = make(kind)
    shown = examples(2)
    found = vlm.attention(vlm.encode(shown), "received")
    for row, example in enumerate(shown):
        weights, _ = weights_by_hand(vlm, layer, example.image)
        by_hand = torch.stack([weights[:, :, column].mean() for column in range(skipped, weights.shape[2])])
        torch.testing.assert_close(found[row], by_hand, atol=1e-6, rtol=1e-4)
    assert found.std() > 1e-4


def test_received_attention_is_pooled_as_patches_are() -> None:
    vlm = make("gemma3")
    (example,) = examples(1)
    weights, _ = weights_by_hand(vlm, -1, example.image)
    patches = weights.mean((0, 1)).reshape(10, 10)
    blocks = [[patches[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean() for c in range(5)] for r in range(5)]
    found = vlm.attention(vlm.encode([example]), "received")
    torch.testing.assert_close(found[0].reshape(5, 5), torch.tensor(blocks), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("kind", "windows"), [*((kind, False) for kind in QWEN), ("qwen2_5_vl", True)])
def test_qwen_s_received_attention_is_that_of_its_own_kernel(kind: str, windows: bool) -> None:
    """The weights are taken from the tower's eager attention, and put in their places by the geometry of the image."""
    vlm = make(kind)
    visual = vlm.model.model.visual
    if windows:
        visual.fullatt_block_indexes = [0]
    shown = examples(2)
    encoded = vlm.encode(shown)
    found = vlm.attention(encoded, "received")
    assert not (found * ~encoded.token_mask).any()
    module = sys.modules[type(visual).__module__]
    eager = module.eager_attention_forward
    calls: list[tuple[int, torch.Tensor]] = []

    def watched(layer: Any, *args: Any, **named: Any) -> Any:
        output, weights = eager(layer, *args, **named)
        calls.append((id(layer), weights[0]))
        return output, weights

    visual.set_attn_implementation("eager")
    for row, example in enumerate(shown):
        calls.clear()
        pixels = vlm.family.pixels([example.image])
        with mock.patch.object(module, "eager_attention_forward", watched), torch.no_grad():
            visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"])
        last = [weights for layer, weights in calls if layer == id(visual.blocks[-1].attn)]
        per_patch = torch.cat([weights.mean(0).sum(0) for weights in last])
        per_token = per_patch.reshape(-1, 4).mean(1) / len(per_patch)
        rows, columns = (int(side) // 2 for side in pixels["image_grid_thw"][0, 1:])
        order = range(rows * columns)  # which token each place of the sequence is
        if kind == "qwen2_5_vl":  # windows of 2 x 2 tokens, in raster order, and in raster order inside
            order = sorted(order, key=lambda i: (i // columns // 2, i % columns // 2, i // columns, i % columns))
        by_hand = torch.zeros(rows * columns)
        for place, token in enumerate(order):
            by_hand[token] = per_token[place]
        assert by_hand.std() > 1e-5
        torch.testing.assert_close(found[row, : len(by_hand)], by_hand, atol=1e-6, rtol=1e-4)
    assert not visual.merger._forward_hooks
    assert not visual.blocks[-1].attn._forward_pre_hooks


def test_keys_and_features_are_those_of_the_selected_layer() -> None:
    vlm = make("llava")
    shown = examples(2)
    for example, view in zip(shown, vlm.family.views([example.image for example in shown]), strict=True):
        weights, keys = weights_by_hand(vlm, -2, example.image)
        torch.testing.assert_close(view.keys, keys.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(view.attention, weights[:, 0, 1:].mean(0), atol=1e-6, rtol=1e-4)
        tokens = vlm.encode([example]).tokens[0]
        torch.testing.assert_close(vlm.family.project(view.features[1:]), tokens, atol=1e-5, rtol=1e-4)


def test_features_of_tokens_are_what_the_projector_reads() -> None:
    vlm = make("llava")
    shown = examples(3)
    encoded = vlm.encode(shown)
    features = vlm.tower_features(encoded)
    assert features.shape == (*encoded.token_mask.shape, vlm.model.config.vision_config.hidden_size)
    with torch.no_grad():
        projected = vlm.model.model.multi_modal_projector(features)
    torch.testing.assert_close(projected, encoded.tokens, atol=1e-5, rtol=1e-4)
    features[:] = 7.0  # a copy
    with torch.no_grad():
        tower = vlm.model.model.vision_tower(**vlm.family.pixels([shown[1].image]), output_hidden_states=True)
    torch.testing.assert_close(vlm.tower_features(encoded)[1], tower.hidden_states[-2][0, 1:], atol=1e-5, rtol=1e-4)
    blocks = BlockVLM(vlm, 3, 2)
    pooled = blocks.tower_features(blocks.encode(shown))
    by_hand = vlm.tower_features(encoded)[2].reshape(3, 2, 2, 3, -1).mean((1, 3)).flatten(0, 1)  # of 6 x 6 tokens
    torch.testing.assert_close(pooled[2], by_hand, atol=1e-5, rtol=1e-4)


def test_towers_without_a_cls_token_have_no_features_for_tokens() -> None:
    vlm = make("gemma3")
    with pytest.raises(NotImplementedError, match="gemma3"):
        vlm.tower_features(vlm.encode(examples(1)))


def test_vispruner_compares_what_comes_before_the_projector() -> None:
    """A projector that makes all tokens alike changes nothing; of a tower without features, tokens are compared."""
    vlm = make("llava")
    encoded = vlm.encode(examples(2))
    kept = torch.tensor([9, 12])
    chosen = VisPruner()(vlm, encoded, kept, torch.Generator())
    encoded.tokens = torch.ones_like(encoded.tokens)
    assert chosen.equal(VisPruner()(vlm, encoded, kept, torch.Generator()))
    vlm = make("gemma3")
    encoded = vlm.encode(examples(2))
    before = VisPruner(kind="received")(vlm, encoded, kept, torch.Generator())
    assert before.sum(1).equal(kept)
    encoded.tokens = torch.ones_like(encoded.tokens)
    assert not before.equal(VisPruner(kind="received")(vlm, encoded, kept, torch.Generator()))


def test_feature_layers_count_from_both_ends() -> None:
    vlm = make("llava")
    encoded = vlm.encode(examples(1))
    from_the_end = [vlm.attention(encoded, kind) for kind in ("cls", "received")]
    vlm.model.config.vision_feature_layer = 1  # of two layers, the output of the first, as -2
    for kind, expected in zip(("cls", "received"), from_the_end, strict=True):
        torch.testing.assert_close(vlm.attention(encoded, kind), expected)
    assert vlm.family.views([examples(1)[0].image])[0].keys.shape == (37, 16)
    for mixed in (0, [1, 2]):
        with pytest.raises(NotImplementedError, match="single vision_feature_layer"):
            layer_index(mixed)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_what_a_family_lacks_is_refused_by_name(kind: str) -> None:
    vlm = make(kind)
    encoded = vlm.encode(examples(1))
    if kind in ATTENDED:
        assert (vlm.attention(encoded, "received")[encoded.token_mask] > 0).all()
    else:
        with pytest.raises(NotImplementedError, match=f"{kind} has no received attention"):
            vlm.attention(encoded, "received")
    if kind not in SHRINKING:
        with pytest.raises(NotImplementedError, match=f"{kind} has no down-sampled images: tiles or pooling"):
            vlm.family.shrunk([examples(1)[0].image], [4])


# -- smaller images --------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), count=st.integers(1, 160))
def test_no_other_grid_within_the_budget_is_finer(rows: int, columns: int, count: int) -> None:
    row, column = grid_within(count, rows, columns)
    assert row * column <= count
    assert 1 <= row <= rows
    assert 1 <= column <= columns
    for other in range(1, rows + 1):
        for width in range(1, columns + 1):
            if other * width <= count:
                fineness = min(other / rows, width / columns)
                assert fineness <= min(row / rows, column / columns)
                if fineness == min(row / rows, column / columns):
                    assert other * width <= row * column
    if count >= rows * columns:
        assert (row, column) == (rows, columns)


def test_no_tokens_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be shrunk to 0 visual tokens"):
        grid_within(0, 4, 4)


def test_shrinking_is_what_pillow_does() -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    small = np.array(Image.fromarray(image).resize((24, 16), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    found = shrink(pixels, 16, 24)
    assert (found[0].permute(1, 2, 0) - torch.from_numpy(small)).abs().max() <= 1  # Pillow rounds twice
    assert shrink(pixels, 48, 48) is pixels


@pytest.mark.parametrize("kind", SHRINKING)
def test_smaller_images_give_at_most_as_many_tokens_as_asked_for(kind: str) -> None:
    vlm = make(kind)
    shown = [example.image for example in examples(2)]
    whole = vlm.family.pictures(shown)
    full = [len(picture.tokens) for picture in whole]
    for counts in ([1, 2], [3, 1], [7, 5], [full[0] - 1, full[1]], full, [999, 999]):
        small = vlm.family.shrunk(shown, counts)
        for picture, count, most in zip(small, counts, full, strict=True):
            assert 0 < len(picture.tokens) <= min(count, most)
            assert picture.positions.shape == (len(picture.tokens), 2)
            assert ((picture.positions >= 0) & (picture.positions <= 1)).all()
            assert torch.isfinite(picture.tokens).all()
    for picture, all_of_it in zip(small, whole, strict=True):
        torch.testing.assert_close(picture.tokens, all_of_it.tokens, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(picture.positions, all_of_it.positions)


def test_a_square_tower_sees_the_smaller_picture_with_interpolated_positions() -> None:
    """Against resizing the image itself, position embeddings interpolated by hand, and the tower's own layers."""
    vlm = make("llava")
    image = np.random.default_rng(1).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    (picture,) = vlm.family.shrunk([image], [13])  # 3 x 4
    assert len(picture.tokens) == 12
    small = np.array(Image.fromarray(image).resize((4 * 8, 3 * 8), Image.Resampling.BICUBIC))
    processor = vlm.processor.image_processor
    mean, std = (torch.tensor(part)[:, None, None] for part in (processor.image_mean, processor.image_std))
    pixels = (torch.from_numpy(small).permute(2, 0, 1) / 255 - mean) / std
    tower = vlm.model.model.vision_tower
    parts = tower.embeddings
    with torch.no_grad():
        patches = parts.patch_embedding(pixels[None]).flatten(2).mT
        table = parts.position_embedding.weight
        grid = table[1:].reshape(1, 6, 6, -1).permute(0, 3, 1, 2)
        places = torch.nn.functional.interpolate(grid, size=(3, 4), mode="bicubic", align_corners=False)
        start = (parts.class_embedding + table[0])[None, None]
        x = tower.pre_layrnorm(torch.cat([start, patches + places.flatten(2).mT], 1))
        x = tower.encoder.layers[0](x, None)
        x = x[0] if isinstance(x, tuple) else x
        expected = vlm.model.model.multi_modal_projector(x[:, 1:])[0]
    error = (picture.tokens - expected).norm() / expected.norm()
    assert error < 0.03, error  # Pillow rounds colours
    centres = [[(row + 0.5) / 3, (column + 0.5) / 4] for row in range(3) for column in range(4)]
    torch.testing.assert_close(picture.positions, torch.tensor(centres))


def test_towers_of_other_kinds_are_refused_by_name() -> None:
    vlm = make("llava")
    vlm.model.model.vision_tower.config.model_type = "pixtral"
    with pytest.raises(NotImplementedError, match="llava has no down-sampled images with a pixtral"):
        vlm.family.shrunk([examples(1)[0].image], [4])
    for kind, name in (("cls", "CLS"), ("received", "received")):
        with pytest.raises(NotImplementedError, match=f"llava has no {name} attention"):
            vlm.attention(vlm.encode(examples(1)), kind)


@pytest.mark.parametrize("kind", QWEN)
def test_a_dynamic_tower_sees_the_image_as_if_it_had_been_given_small(kind: str) -> None:
    vlm = make(kind)
    (example,) = examples(1)  # 40 x 64 pixels, more tokens than 6
    (picture,) = vlm.family.shrunk([example.image], [6])
    assert len(picture.tokens) == 6
    assert picture.grid is not None
    rows, columns = picture.grid[1:].tolist()
    small = Image.fromarray(example.image).resize((columns * 8, rows * 8), Image.Resampling.BICUBIC)
    vlm.processor.image_processor.size = {"shortest_edge": 1, "longest_edge": 10**6}
    (expected,) = vlm.family.pictures([dataclasses.replace(example, image=np.asarray(small)).image])
    assert picture.tokens.equal(expected.tokens)
    assert picture.positions.equal(expected.positions)
    assert picture.grid.equal(expected.grid)
