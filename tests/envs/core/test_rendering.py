from __future__ import annotations

import warnings
from typing import Any

import matplotlib
import numpy as np
import pytest

from grip_env.envs.core.rendering import Panel, captioned, draw_selection, gallery
from grip_env.envs.selection import TokenSelectionEnv
from tests.fakes import FakeTask, FakeVLM, indices


def grid(rows: int, columns: int) -> np.ndarray:
    """Return the centres of a grid's cells, (rows * columns, 2)."""
    down, across = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    return np.stack(np.meshgrid(down, across, indexing="ij"), -1).reshape(-1, 2)


IMAGE = np.full((96, 96, 3), (180, 90, 60), dtype=np.uint8)


def test_kept_cells_keep_their_pixels_and_dropped_ones_are_dimmer_and_greyer() -> None:
    selection = np.zeros(144, dtype=bool)
    selection[[0, 77]] = True
    drawn = draw_selection(IMAGE, grid(12, 12), selection).astype(float)
    assert drawn.shape == (480, 480, 3)
    cells = drawn.reshape(12, 40, 12, 40, 3).swapaxes(1, 2).reshape(144, 40, 40, 3)
    assert (cells[selection] == IMAGE[0, 0]).all()
    dropped = np.median(cells[~selection], (1, 2))
    assert (dropped.max(-1) < 0.6 * IMAGE.max()).all()
    spread = np.ptp(dropped, -1) / dropped.max(-1)
    assert (spread < 0.5 * np.ptp(IMAGE[0, 0].astype(float)) / IMAGE.max()).all()


def test_a_light_rim_surrounds_kept_cells() -> None:
    selection = np.zeros(144, dtype=bool)
    selection[77] = True  # row 6, column 5
    drawn = draw_selection(IMAGE, grid(12, 12), selection)
    assert drawn[239, 220].min() > 180
    assert drawn[260, 199].min() > 180
    assert drawn[230, 220].max() < 120


def test_without_a_selection_or_with_all_kept_the_image_is_untouched() -> None:
    enlarged = np.repeat(np.repeat(IMAGE, 5, 0), 5, 1)
    assert (draw_selection(IMAGE, grid(12, 12)) == enlarged).all()
    assert (draw_selection(IMAGE, grid(12, 12), np.ones(144, dtype=bool)) == enlarged).all()


def test_nothing_kept_dims_everything() -> None:
    drawn = draw_selection(IMAGE, grid(12, 12), np.zeros(144, dtype=bool))
    assert drawn.max() < 0.6 * IMAGE.max()


def test_relevant_cells_are_marked_inside_only() -> None:
    relevant = np.zeros(144, dtype=bool)
    relevant[77] = True
    plain, marked = (
        draw_selection(IMAGE, grid(12, 12)),
        draw_selection(IMAGE, grid(12, 12), relevant=relevant),
    )
    changed = np.argwhere((plain != marked).any(-1))
    assert len(changed) > 0
    assert changed.min(0).tolist() >= [240, 200]
    assert changed.max(0).tolist() <= [279, 239]
    assert len(changed) < 0.1 * 40 * 40


@pytest.mark.parametrize(("shape", "rows", "columns"), [((600, 900), 16, 24), ((20, 31), 4, 1), ((7, 480), 1, 6)])
def test_any_image_size_and_any_grid(shape: tuple[int, int], rows: int, columns: int) -> None:
    image = np.full((*shape, 3), 200, dtype=np.uint8)
    selection = np.zeros(rows * columns, dtype=bool)
    selection[-1] = True
    drawn = draw_selection(image, grid(rows, columns), selection)
    assert 400 <= max(drawn.shape[:2]) <= 520
    assert drawn[-1, -1].tolist() == [200, 200, 200]
    bright = (drawn == 200).all(-1).mean()
    assert bright == pytest.approx(1 / (rows * columns), rel=0.25)


def test_text_goes_below_and_long_text_is_wrapped_not_cut() -> None:
    plain = draw_selection(IMAGE, grid(12, 12))
    short = draw_selection(IMAGE, grid(12, 12), lines=["why?"])
    long = draw_selection(IMAGE, grid(12, 12), lines=["why does this take so very many words to ask? " * 3])
    assert (short[:480] == plain).all()
    assert short.shape[1] == long.shape[1] == 480
    assert long.shape[0] > short.shape[0] > 480
    assert short[480:].min() < 100  # there is ink


def test_status_rows_are_cut_so_that_the_size_depends_on_their_number_alone() -> None:
    def draw(*status: str) -> np.ndarray:
        return draw_selection(IMAGE, grid(12, 12), lines=["why?"], status=status)

    short, long, empty = draw("yes", "no"), draw("so many words " * 30, "no"), draw("", "")
    assert short.shape == long.shape == empty.shape
    assert draw("yes").shape[0] < short.shape[0]
    assert (short != long).any()
    assert (short[:480] == empty[:480]).all()
    assert draw_selection(IMAGE, grid(12, 12), status=["alone"]).shape[0] > 480


@pytest.mark.parametrize("shape", [(96, 96), (12, 12), (101, 100), (480, 640), (1600, 40), (30, 700), (1, 1)])
def test_frames_have_one_size_whatever_the_image_and_the_texts(shape: tuple[int, int]) -> None:
    """As recorders of several episodes and of several environments need; odd sizes play in few video players."""
    expected = draw_selection(IMAGE, grid(12, 12), lines=["why?"], status=["", "red"], likelihood=(0.2, 0.5))
    assert expected.shape[1] == 480
    image, texts = np.full((*shape, 3), 90, dtype=np.uint8), ("?", "so very many words " * 90, "unbroken" * 200, "")
    for question in texts:
        for answer in texts:
            frame = draw_selection(image, grid(24, 24), lines=[question], status=["", answer], likelihood=(None, 0.5))
            assert frame.shape == expected.shape
    square = draw_selection(image, grid(24, 24), size=200, square=True)
    assert square.shape == (200, 200, 3)
    rows, columns = np.nonzero((square == 90).all(-1))
    middle = [rows.min() + rows.max(), columns.min() + columns.max()]
    assert middle == pytest.approx([199, 199], abs=1)  # centred
    inside = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    assert 160 <= max(inside) <= 200
    assert inside == pytest.approx(np.array(shape) * max(inside) / max(shape), abs=1)  # not distorted


def test_odd_frames_become_even() -> None:
    for size in (479, 480):
        frame = captioned(IMAGE[:95, :95], ["why?"], ["yes"], size)
        assert [side % 2 for side in frame.shape[:2]] == [0, 0]


def test_a_question_too_long_for_a_frame_ends_in_dots_and_fills_its_rows() -> None:
    def rows_of_ink(question: str) -> int:
        strip = draw_selection(IMAGE, grid(12, 12), lines=[question], status=[""])[482:]
        ink = (strip.min(-1) < 128).any(1)
        return int((np.diff(ink.astype(int)) == 1).sum())

    assert [rows_of_ink("xo " * count) for count in (1, 20, 45, 300)] == [1, 2, 3, 3]
    assert rows_of_ink("xo" * 300) == 3  # words too long for a row are broken
    whole, cut = (draw_selection(IMAGE, grid(12, 12), lines=["xo " * n], status=[""]) for n in (300, 301))
    assert (whole == cut).all()


@pytest.mark.parametrize("text", ["red\nor\tblue", "\n", "  red  ", "红色的圆" * 40, "x" * 5000])
def test_any_text_can_be_set(text: str) -> None:
    frame = draw_selection(IMAGE, grid(12, 12), lines=[text], status=[text, text])
    assert frame.shape == draw_selection(IMAGE, grid(12, 12), lines=[""], status=["", ""]).shape
    assert gallery([[Panel(IMAGE, text)]], note=text, size=100).shape[1] == 120
    spaced = draw_selection(IMAGE, grid(12, 12), lines=[" ".join(text.split())], status=[text])
    assert (draw_selection(IMAGE, grid(12, 12), lines=[text], status=[text]) == spaced).all()


def test_the_bar_is_as_long_as_the_probability_and_marks_the_one_with_all_tokens() -> None:
    def bar(*likelihood: Any) -> tuple[int, int]:
        """Return the pixels of the bar and the column of the mark."""
        frame = draw_selection(IMAGE, grid(12, 12), status=["x"], likelihood=likelihood).astype(int)[482:]
        blue = (frame[..., 2] - frame[..., 0] > 100).any(0)
        mark = np.flatnonzero((frame < 40).all(-1).any(0))
        return int(blue.sum()), int(mark.mean())

    track = 480 - 2 * 15
    assert bar(None, 0.5) == (0, 15 + track // 2)
    (quarter, first), (half, second), (whole, last) = bar(0.25, 0.9), bar(0.5, 0.75), bar(1.0, 0.0)
    assert [quarter, half, whole] == pytest.approx([track / 4, track / 2, track], abs=4)
    assert [first, second, last] == pytest.approx([15 + 0.9 * track, 15 + 0.75 * track, 15], abs=2)


def test_dropped_cells_between_kept_ones_stay_visible_where_cells_are_small() -> None:
    for height, width in ((480, 480), (480, 160), (160, 480)):
        image = np.full((height, width, 3), 120, dtype=np.uint8)
        checkered = (np.arange(576) + np.arange(576) // 24) % 2 == 0
        drawn = draw_selection(image, grid(24, 24), checkered)
        assert (drawn == 120).all(-1).mean() == pytest.approx(0.5, abs=0.01)
        assert (drawn.max(-1) < 60).mean() > 0.15


def test_dots_are_seen_in_small_cells_and_do_not_leave_them() -> None:
    relevant = np.zeros(576, dtype=bool)
    relevant[300] = True
    for height, width, least in ((480, 480, 9), (480, 240, 9), (480, 80, 2)):
        image = np.zeros((height, width, 3), dtype=np.uint8)
        drawn = draw_selection(image, grid(24, 24), relevant=relevant)
        rows, columns = np.nonzero(drawn.max(-1) > 200)
        assert len(rows) >= least
        assert set(rows // (height // 24)) == {300 // 24}
        assert set((columns * 24) // width) == {300 % 24}


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        draw_selection(IMAGE / 255, grid(12, 12))
    with pytest.raises(ValueError, match=r"selection must have shape \(144,\).*\(3,\)"):
        draw_selection(IMAGE, grid(12, 12), np.ones(3, dtype=bool))


def test_gallery_places_pictures_in_a_grid() -> None:
    red, blue = np.zeros((30, 30, 3), np.uint8), np.zeros((30, 30, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = gallery([[red, blue], [Panel(blue, "caption"), None]], size=100)
    assert sheet.dtype == np.uint8
    is_red, is_blue = (sheet == (255, 0, 0)).all(-1), (sheet == (0, 0, 255)).all(-1)
    assert is_red.sum() == 100 * 100
    assert is_blue.sum() == 2 * 100 * 100
    red_row, red_column = np.argwhere(is_red).min(0)
    assert is_blue[red_row, red_column + 100 :].sum() == 100  # to the right of red
    assert is_blue[red_row + 100 :, red_column].sum() == 100  # and below it


def test_gallery_fits_tall_and_wide_pictures_into_a_square() -> None:
    tall, wide = np.zeros((1600, 40, 3), np.uint8), np.zeros((20, 600, 3), np.uint8)
    sheet = gallery([[tall, wide]], size=100)
    assert sheet.shape == gallery([[IMAGE, IMAGE]], size=100).shape
    black = (sheet == 0).all(-1)
    rows, columns = np.nonzero(black[:, :115])
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (100, 2)
    assert columns.mean() == pytest.approx(10 + 50, abs=1)


def test_gallery_labels_make_room_for_themselves() -> None:
    pictures: list[list[Any]] = [[IMAGE, IMAGE]]
    bare = gallery(pictures, size=120)
    labelled = gallery(pictures, ["family"], ["5%", "10%"], title="Title", note="note " * 40, size=120)
    assert labelled.shape[0] > bare.shape[0]
    assert labelled.shape[1] > bare.shape[1]
    with pytest.raises(ValueError, match="1 labels for 2 columns"):
        gallery(pictures, columns=["5%"])
    with pytest.raises(ValueError, match="at least one picture"):
        gallery([[None]])


# -- through the environment -----------------------------------------------------------------------------


def make(render_mode: Any) -> TokenSelectionEnv:
    return TokenSelectionEnv(vlm=FakeVLM(), task=FakeTask(), budget=0.25, action_mode="scores", render_mode=render_mode)


def test_rgb_array_shows_the_plain_image_first_and_the_selection_after_the_step() -> None:
    env = make("rgb_array")
    env.reset(seed=0)
    before = env.render()
    _, _, _, _, info = env.step(np.arange(16.0))
    after = env.render()
    assert before is not None
    assert after is not None
    assert before.dtype == after.dtype == np.uint8
    assert before.shape == after.shape  # as the frames of a video must be
    assert before.shape[1:] == (480, 3)
    assert before.shape[0] > 480
    cells = after[:480].reshape(4, 120, 4, 120, 3).mean((1, 3, 4)).reshape(16)
    plain = before[:480].reshape(4, 120, 4, 120, 3).mean((1, 3, 4)).reshape(16)
    kept = np.isin(np.arange(16), indices(info["kept"]))
    assert (cells[:8] < plain[:8]).all()  # row 2 has the rim of the kept row
    assert (np.abs(cells - plain)[kept] < 5).all()  # but for dots


def test_human_mode_draws_without_a_display_and_without_a_warning() -> None:
    matplotlib.use("Agg", force=True)
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make("human")
        for seed in range(2):
            env.reset(seed=seed)
            env.step(np.arange(16.0))
        assert env.render() is None
        assert len(pyplot.get_fignums()) == 1
        env.close()
        env.close()
    assert pyplot.get_fignums() == []


def test_render_without_a_mode_warns_and_unknown_modes_are_refused() -> None:
    env = make(None)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None
    with pytest.raises(ValueError, match="ascii"):
        make("ascii")


def test_what_any_kept_token_shows_stays_bright() -> None:
    """A token of the whole-image view shows more than one of a tile; a newline shows nothing."""
    places = np.array([[0.25, 0.25], [0.875, 0.875], [0.5, 1.0]])
    cells = np.array([[0.5, 0.5], [0.25, 0.25], [0.0, 0.0]])
    drawn = draw_selection(IMAGE, places, np.ones(3, dtype=bool), cells=cells)
    plain = draw_selection(IMAGE, places)
    side = len(plain)
    bright = (drawn == plain).all(-1)
    half, quarter = side // 2, side // 4
    assert bright[:half, :half].all()
    assert bright[-quarter:, -quarter:].all()
    dim = ~bright
    assert dim[: half - 8, half + 8 :].mean() > 0.95
    assert dim[half + 8 : -quarter - 8, half + 8 :].mean() > 0.95
    with pytest.raises(ValueError, match=r"cells must have shape \(3, 2\)"):
        draw_selection(IMAGE, places, cells=cells[:2])
