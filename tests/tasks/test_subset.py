from __future__ import annotations

import pytest

from grip_env.tasks.base import Task
from grip_env.tasks.scenes import SceneTask
from grip_env.tasks.subset import TaskSubset


def test_a_subset_has_its_examples_in_their_order_and_no_others() -> None:
    whole = SceneTask()
    part = TaskSubset(whole, "test", range(5, 2, -1))
    assert isinstance(part, Task)
    assert (part.name, part.splits, part.size("test")) == ("scenes", ("test",), 3)
    assert [part.example("test", index).key for index in range(3)] == [f"scenes/test/{index}" for index in (5, 4, 3)]
    for split in ("train", "nonsense"):
        with pytest.raises(ValueError, match=split):
            part.size(split)
    with pytest.raises(IndexError, match="choose 0 to 2"):
        part.example("test", 3)
