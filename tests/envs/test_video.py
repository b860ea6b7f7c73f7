"""Gymnasium's own recorders write films of episodes that a player can show (needs moviepy)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.wrappers import RecordVideo
from gymnasium.wrappers import vector as many

from grip_env.tasks.base import Example
from tests.envs.test_specs import every_case, make, make_many, seeded
from tests.fakes import FakeTask

editor = pytest.importorskip("moviepy", reason="needs moviepy, which records videos")


class Album(FakeTask):
    """Pictures of several shapes, with questions and answers of several lengths."""

    def example(self, split: str, index: int) -> Example:
        plain = super().example(split, index)
        height, width = ((24, 24), (30, 90), (97, 25), (300, 211))[index % 4]
        image = plain.image[np.arange(height)[:, None] * 12 // height, np.arange(width) * 12 // width]
        question = "what is it? " * (1 + index % 3)
        return Example(image, question, plain.answer * (1 + 30 * (index % 2)), plain.family, plain.relevance, plain.key)


def read(path: Path) -> list[np.ndarray]:
    """Return the frames of a film, uint8 (height, width, 3)."""
    with editor.VideoFileClip(str(path)) as clip:
        return [frame.copy() for frame in clip.iter_frames()]


def assert_shows(film: list[np.ndarray], frames: list[np.ndarray]) -> None:
    """Assert that a film is these frames, up to what compression changes."""
    assert len(film) == len(frames)
    for seen, drawn in zip(film, frames, strict=True):
        assert seen.shape == drawn.shape
        assert np.abs(seen.astype(int) - drawn).mean() < 4


@every_case
def test_a_film_shows_each_episode_from_its_start_to_what_came_of_it(case: str, tmp_path: Path) -> None:
    env = make(case, render_mode="rgb_array")
    frames: dict[int, list[np.ndarray]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder = seeded(RecordVideo(env, str(tmp_path / "films"), episode_trigger=lambda episode: episode < 2))
        for episode in range(2):
            recorder.reset(seed=episode)
            frames[episode], terminated = [np.asarray(env.render())], False
            while not terminated:
                _, _, terminated, _, _ = recorder.step(recorder.action_space.sample())
                frames[episode].append(np.asarray(env.render()))
        recorder.close()
    for episode, drawn in frames.items():
        assert_shows(read(tmp_path / "films" / f"rl-video-episode-{episode}.mp4"), drawn)


@every_case
def test_one_film_spans_episodes_about_pictures_of_all_shapes(case: str, tmp_path: Path) -> None:
    env = seeded(make(case, task=Album(), render_mode="rgb_array", max_question_tokens=64))
    recorder = RecordVideo(env, str(tmp_path / "films"), video_length=20, step_trigger=lambda step: step == 0)
    for episode in range(12):
        recorder.reset(options={"index": episode % 4})
        terminated = False
        while not terminated:
            terminated = recorder.step(env.action_space.sample())[2]
    recorder.close()
    (path,) = (tmp_path / "films").iterdir()
    assert len(read(path)) > 12


@every_case
def test_many_are_filmed_side_by_side(case: str, tmp_path: Path) -> None:
    """Gymnasium warns that SAME_STEP loses an episode's last frame; ours draw it, as what the last step decided."""
    envs = seeded(make_many(case, task=Album(), render_mode="rgb_array", max_question_tokens=64, num_envs=4))
    with pytest.warns(UserWarning, match="same-step"):
        recorder: Any = many.RecordVideo(
            envs, str(tmp_path / "films"), step_trigger=lambda step: step == 0, video_length=6
        )
    recorder.reset(seed=0, options={"index": [0, 1, 2, 3]})
    for _ in range(9):
        recorder.step(envs.action_space.sample())
    recorder.close()
    (path,) = (tmp_path / "films").iterdir()
    film, (frame, *_) = read(path), envs.render() or ()
    assert film[0].size == 4 * frame.size
    assert len(film) == 7
