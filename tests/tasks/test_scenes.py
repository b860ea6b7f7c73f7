"""Every answer is worked out again from what is in the scene, by rules of their own."""

from __future__ import annotations

import collections
import random
import re

import numpy as np
import pytest

from grip_env.tasks import sprites
from grip_env.tasks.base import Task
from grip_env.tasks.scene_levels import LEVELS
from grip_env.tasks.scenes import FAMILIES, SIDE, Question, Scene, SceneTask, Thing, plural

CELL = 8
COUNT = 60
"""Questions of each family."""
TASKS = {
    "standard": SceneTask(),
    "ten": SceneTask((*FAMILIES, "larger", "more", "same", "near")),
    "hard": SceneTask(level="hard"),
}


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> SceneTask:
    return TASKS[request.param]


@pytest.fixture(scope="module")
def asked(task: SceneTask) -> list[tuple[Scene, Question]]:
    return [task.scene_and_question("validation", index) for index in range(COUNT * len(task.families))]


def matching(scene: Scene, **wanted: object) -> list[Thing]:
    return [thing for thing in scene.things if all(getattr(thing, key) == value for key, value in wanted.items())]


def the(things: list[Thing]) -> Thing:
    (one,) = things  # fails where the premise "the ..." does not hold
    return one


def work_out(scene: Scene, text: str) -> tuple[str, str, list[Thing]]:
    """Answer a question by looking through all things: family, answer and the things it is about."""
    if found := re.fullmatch(r"is there (a|an) (\w+) (\w+)\?", text):
        article, colour, kind = found.groups()
        assert (article == "an") == (colour[0] in "aeiou")
        there = matching(scene, kind=kind, colour=colour)
        # both words occur in the scene, so that neither alone gives "no" away
        assert matching(scene, kind=kind)
        assert [thing for thing in matching(scene, colour=colour) if thing.kind in sprites.SHAPES]
        return "existence", "yes" if there else "no", there or matching(scene, kind=kind)
    if found := re.fullmatch(r"what color is the (\w+)\?", text):
        thing = the(matching(scene, kind=found[1]))
        return "color", thing.colour, [thing]
    if found := re.fullmatch(r"how many (\w+) are there\?", text):
        kind = next(kind for kind in sprites.SHAPES if plural(kind) == found[1])
        return "counting", str(len(matching(scene, kind=kind))), matching(scene, kind=kind)
    if found := re.fullmatch(r"what digit is on the (\w+) card\?", text):
        card = the(matching(scene, kind="card", colour=found[1]))
        return "reading", str(card.number), [card]
    if found := re.fullmatch(r"what shape is the (\w+) object\?", text):
        thing = the(matching(scene, colour=found[1]))  # decorations and cards count: nothing else has the colour
        return "shape", thing.kind, [thing]
    if found := re.fullmatch(r"what number is on the (\w+) plate\?", text):
        plate = the(matching(scene, kind="plate", colour=found[1]))
        return "number", str(plate.number), [plate]
    if found := re.fullmatch(r"which card has the larger digit, the (\w+) or the (\w+)\?", text):
        cards = [the(matching(scene, kind="card", colour=found[place])) for place in (1, 2)]
        low, high = sorted(cards, key=lambda card: int(card.number or 0))
        assert low.number != high.number
        return "larger", high.colour, cards
    if found := re.fullmatch(r"do the (\w+) and the (\w+) card show the same digit\?", text):
        cards = [the(matching(scene, kind="card", colour=found[place])) for place in (1, 2)]
        return "same", "yes" if cards[0].number == cards[1].number else "no", cards
    if found := re.fullmatch(r"are the (\w+) and the (\w+) the same color\?", text):
        two = [the(matching(scene, kind=found[place])) for place in (1, 2)]
        return "same", "yes" if two[0].colour == two[1].colour else "no", two
    if found := re.fullmatch(r"are there more (\w+) than (\w+)\?", text):
        kinds = {plural(kind): kind for kind in sprites.SHAPES}
        groups = [matching(scene, kind=kinds[found[place]]) for place in (1, 2)]
        assert 0 < len(groups[0]) < len(groups[1]) + 3, "there are some of both, and one look would not do"
        assert 0 < len(groups[1]) < len(groups[0]) + 3
        return "more", "yes" if len(groups[0]) > len(groups[1]) else "no", groups[0] + groups[1]
    if found := re.fullmatch(r"what color is the (\w+) near the (\w+) card\?", text):
        card = the(matching(scene, kind="card", colour=found[2]))
        group = matching(scene, kind=found[1])
        away = [float(np.hypot(*np.subtract(thing.centre, card.centre))) for thing in group]
        near, next_near, *_ = sorted(away)
        assert next_near >= 1.5 * near, "one of them is clearly the one that is near"
        thing = group[away.index(near)]
        return "near", thing.colour, [card, thing]
    if found := re.fullmatch(r"what color is the odd one of the (\w+)\?", text):
        kind = next(kind for kind in sprites.SHAPES if plural(kind) == found[1])
        group = matching(scene, kind=kind)
        (usual, times), (odd, once) = collections.Counter(thing.colour for thing in group).most_common()
        assert (times, once) == (len(group) - 1, 1)
        assert times > 1
        assert usual != odd
        return "odd", odd, group
    found = re.fullmatch(r"is the (\w+) left or right of the (\w+)\?", text)
    assert found, f"unknown question {text!r}"
    first, second = the(matching(scene, kind=found[1])), the(matching(scene, kind=found[2]))
    gap = (first.left + first.size / 2) - (second.left + second.size / 2)
    assert 2 * CELL <= abs(gap) <= 4 * CELL, "visible on the grid, and not to be told from the place of one alone"
    return "relation", "left" if gap < 0 else "right", [first, second]


def painted(thing: Thing, grid: int) -> np.ndarray:
    """The share of each cell that ``thing`` covers, by painting it and counting: float (grid, grid)."""
    canvas = np.zeros((3, CELL * grid, CELL * grid), dtype=np.float32)
    sprites.composite(canvas, thing.mask, np.ones((3, 1, 1), dtype=np.float32), thing.top, thing.left)
    cells = [
        [canvas[:, CELL * row : CELL * (row + 1), CELL * column : CELL * (column + 1)].mean() for column in range(grid)]
        for row in range(grid)
    ]
    return np.array(cells)


def test_answers_are_true_and_premises_hold_over_everything(
    asked: list[tuple[Scene, Question]], task: SceneTask
) -> None:
    assert collections.Counter(question.family for _, question in asked) == dict.fromkeys(task.families, COUNT)
    for scene, question in asked:
        expected_family, answer, about = work_out(scene, question.text)
        assert (question.family, question.answer) == (expected_family, answer), question.text
        assert question.answer in task.level.choices[question.family]
        assert [scene.things[index] for index in sorted(question.about)] == [t for t in scene.things if t in about]


def test_every_question_a_scene_can_be_asked_is_true(asked: list[tuple[Scene, Question]], task: SceneTask) -> None:
    """Pre-training asks them all, not only the one an example shows."""
    total = 0
    for scene, _ in asked[:60]:
        for family in task.families:
            for question in scene.questions(family):
                assert work_out(scene, question.text)[:2] == (question.family, question.answer)
                total += 1
            for answer in task.level.choices[family][:10]:
                assert all(question.answer == answer for question in scene.questions(family, answer))
    assert total > 60 * 10


def test_relevance_marks_the_cells_of_the_things_asked_about_and_no_others(
    asked: list[tuple[Scene, Question]],
) -> None:
    for scene, question in asked[:240]:
        relevance = scene.relevance(question.about)
        assert relevance.shape == (scene.level.grid, scene.level.grid)
        assert relevance.dtype == np.float32
        assert relevance.min() >= 0
        assert relevance.max() <= 1
        cover = np.stack([painted(thing, scene.level.grid) for thing in work_out(scene, question.text)[2]])
        best = cover >= cover.max((1, 2), keepdims=True) - 1e-3
        clearly = (cover >= 0.26).any(0)
        hardly = (cover <= 0.24).all(0) & ~best.any(0)
        assert (relevance[clearly] > 0).all()
        assert (relevance[hardly] == 0).all()
        # one best cell of each thing comes before every other cell
        top = np.sort(relevance, axis=None)[::-1][: len(cover)]
        assert top.min() > 0.5
        assert all((relevance[cells] > 0.5).any() for cells in best)
        assert (relevance > 0.5).sum() == len(cover)


def test_a_question_needs_few_tokens_and_clutter_covers_a_third_to_a_half(
    asked: list[tuple[Scene, Question]], task: SceneTask
) -> None:
    relevant = [float((scene.relevance(question.about) > 0).mean()) for scene, question in asked]
    assert 0.02 < np.mean(relevant) < 0.08
    assert max(relevant) < (0.2 if task is TASKS["standard"] else 0.25)
    covered = [
        np.mean(np.max([scene.coverage(index) for index in range(len(scene.things))], axis=0) >= 0.15)
        for scene, _ in asked[:150]
    ]
    assert 0.3 < np.mean(covered) < (0.55 if task.name == "scenes-hard" else 0.5)


def test_things_lie_inside_the_picture_and_never_touch(asked: list[tuple[Scene, Question]]) -> None:
    for scene, _ in asked:
        side = scene.level.side
        taken = np.zeros((side + 2, side + 2), dtype=bool)
        for thing in scene.things:
            assert min(thing.top, thing.left) >= 0
            assert thing.top + thing.size <= side
            assert thing.left + thing.width <= side
            rows = slice(thing.top, thing.top + thing.size + 1)  # with a pixel's distance
            columns = slice(thing.left, thing.left + thing.width + 1)
            assert not taken[rows, columns].any()
            taken[rows, columns] = True


def test_scenes_hold_shapes_cards_plates_and_decorations(asked: list[tuple[Scene, Question]], task: SceneTask) -> None:
    hard = task.name == "scenes-hard"
    sizes: collections.Counter[int] = collections.Counter()
    clutter = 0
    for scene, _ in asked:
        shapes = [thing for thing in scene.things if thing.is_shape]
        cards = [thing for thing in scene.things if thing.kind == "card"]
        decorations = [thing for thing in scene.things if thing.kind in sprites.DECORATIONS]
        plates = [thing for thing in scene.things if thing.kind == "plate"]
        assert (len(cards), len(plates)) == ((4, 2) if hard else (2, 0))
        assert len({card.colour for card in cards}) == len(cards)
        assert len({plate.colour for plate in plates}) == len(plates)
        assert {len(str(plate.number)) for plate in plates} <= {2}
        assert len(shapes) + len(cards) + len(plates) + len(decorations) == len(scene.things)
        assert (not hard) <= len(decorations) <= 12
        sizes[len(shapes)] += 1
        clutter += len(decorations)
    assert set(sizes) == ({11, 12, 13} if hard else {5, 6, 7})
    assert clutter / len(asked) > 4  # what found no place was left out


@pytest.mark.parametrize(
    ("level", "family"),
    [(name, family) for name, level in LEVELS.items() for family in (*level.families, *level.more_families)],
)
def test_answers_are_balanced(level: str, family: str) -> None:
    task = SceneTask((family,), level)
    given = collections.Counter(task.scene_and_question("train", index)[1].answer for index in range(300))
    known = task.level.choices[family]
    choices = len(known)
    assert set(given) == set(known) if choices < 20 else set(given) < set(known)
    # each count is binomial: five standard deviations
    assert max(given.values()) / 300 < 1 / choices + 5 * (1 / choices * (1 - 1 / choices) / 300) ** 0.5


def test_question_words_do_not_give_the_answer_away() -> None:
    """Answering each question text by its most frequent answer in training stays close to guessing."""
    task = SceneTask(("existence", "counting", "relation"))
    seen: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for index in range(1500):
        question = task.scene_and_question("train", index)[1]
        seen[question.text][question.answer] += 1
    hits = total = 0
    for index in range(450):
        question = task.scene_and_question("validation", index)[1]
        if question.text in seen:
            hits += seen[question.text].most_common(1)[0][0] == question.answer
            total += 1
    assert total > 400
    assert hits / total < 0.55  # guessing is right in (1/2 + 1/3 + 1/2) / 3 = 0.44 of the cases


def test_the_place_of_one_object_hardly_tells_left_from_right() -> None:
    """Guessing by half of the picture stays far from knowing; at the rim one object must give it away."""
    task = SceneTask(("relation",))
    asked = [task.scene_and_question("validation", index) for index in range(600)]
    for role in range(2):
        left_half = [scene.things[question.about[role]].centre[1] < SIDE / 2 for scene, question in asked]
        says_left = [(question.answer == "left") == (role == 0) for _, question in asked]
        assert np.mean(np.equal(left_half, says_left)) < 0.75


def test_same_split_and_index_give_the_same_example() -> None:
    for index in (0, 1, 2, 3, 4, 5, 11_999):
        one, two = (SceneTask().example("test", index) for _ in range(2))
        assert np.array_equal(one.image, two.image)
        assert np.array_equal(one.relevance, two.relevance)  # type: ignore[arg-type]
        assert (one.question, one.answer, one.family, one.key) == (two.question, two.answer, two.family, two.key)
    keys = [SceneTask().example(split, index).key for split in SceneTask.splits for index in range(20)]
    assert len(set(keys)) == 60


def test_global_random_state_has_no_say() -> None:
    task = SceneTask()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002  (the state that must not matter)
    one = task.example("train", 7).image
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert np.array_equal(one, task.example("train", 7).image)


def test_pictures_are_rgb_and_differ() -> None:
    task = SceneTask()
    examples = [task.example("train", index) for index in range(12)]
    for example in examples:
        assert example.image.shape == (SIDE, SIDE, 3)
        assert example.image.dtype == np.uint8
        assert example.image.std() > 15
    assert len({example.image.tobytes() for example in examples}) == 12
    assert [example.family for example in examples] == list(FAMILIES) * 2


def test_drawing_shows_each_thing_at_its_place() -> None:
    scene, _ = SceneTask().scene_and_question("train", 0)
    *others, last = scene.things
    differs = (scene.draw() != Scene(others, scene.texture).draw()).any(-1)
    rows, columns = slice(last.top, last.top + last.size), slice(last.left, last.left + last.size)
    inside = np.zeros_like(differs)
    inside[rows, columns] = True
    assert not differs[~inside].any()
    assert differs[rows, columns].mean() > 0.1
    for thing in scene.things:
        if thing.kind in ("circle", "square", "star", "cross"):
            row, column = (int(place) for place in thing.centre)
            seen = scene.draw()[row, column].astype(int)
            assert np.abs(seen - sprites.PALETTE[thing.colour]).max() <= 13


# -- splits ----------------------------------------------------------------------------------------------


def contents(scene: Scene) -> tuple[tuple[str, str, int], ...]:
    return tuple(
        sorted(
            (thing.kind, thing.colour, -1 if thing.number is None else thing.number)
            for thing in scene.things
            if thing.kind not in sprites.DECORATIONS
        )
    )


def test_no_draw_of_objects_is_in_two_splits() -> None:
    """The draws begin with the objects, so equal seeds offer equal objects to each split; only one may take them."""
    taken: collections.Counter[str] = collections.Counter()
    for seed in range(600):
        splits = [split for split in SceneTask.splits if SceneTask.sample_scene(split, random.Random(seed)) is not None]
        assert len(splits) <= 1
        taken.update(splits)
    total = sum(taken.values())
    assert total > 400
    for split, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        assert abs(taken[split] / total - share) < 0.08


def test_a_split_depends_on_objects_alone() -> None:
    """Clutter, sizes, places and order may be what they like: the same objects stay in their split."""
    by_contents: dict[tuple[tuple[str, str, int], ...], set[str]] = collections.defaultdict(set)
    task = SceneTask()
    for split in task.splits:
        for index in range(500):
            by_contents[contents(task.scene_and_question(split, index)[0])].add(split)
    assert all(len(splits) == 1 for splits in by_contents.values())

    from grip_env.tasks import scene_layout, scenes

    things = task.scene_and_question("test", 0)[0].things
    named = [(thing.kind, thing.colour, thing.number) for thing in things if thing.kind not in sprites.DECORATIONS]
    assert scene_layout.bucket(named[::-1]) == scene_layout.bucket(named)
    assert scene_layout.bucket(named) in scenes._BUCKETS["test"]
    # with eight colours for one shape, some other bucket must come up: the digest does read colours
    recoloured = [[(named[0][0], colour, named[0][2]), *named[1:]] for colour in sprites.PALETTE]
    assert len({scene_layout.bucket(row) for row in recoloured}) > 1


# -- errors ----------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused_with_the_choices() -> None:
    task = SceneTask()
    assert isinstance(task, Task)
    with pytest.raises(
        ValueError, match=r"unknown split 'dev' of task 'scenes': choose one of train, validation, test"
    ):
        task.example("dev", 0)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        task.size("dev")
    with pytest.raises(IndexError, match="example 12000 of split 'test' does not exist: choose 0 to 11999"):
        task.example("test", task.size("test"))
    with pytest.raises(IndexError, match="example -1"):
        task.example("train", -1)
    with pytest.raises(ValueError, match=r"\['colour'\]: choose from existence, color"):
        SceneTask(("color", "colour"))
    with pytest.raises(ValueError, match="choose from existence"):
        SceneTask(())
    with pytest.raises(ValueError, match="unknown sprite 'heart'"):
        sprites.sprite("heart", 14, 0)


def test_chosen_families_take_turns() -> None:
    task = SceneTask(("reading", "shape"))
    assert [task.scene_and_question("test", index)[1].family for index in range(4)] == ["reading", "shape"] * 2
