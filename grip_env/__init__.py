"""Reinforcement learning on visual-token pruning: Gymnasium environments around a frozen VLM.

Importing this package registers ``GRIP/TokenSelection-v0`` and ``GRIP/SmallSelection-v0``. What is heavier than
Gymnasium loads when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from grip_env.envs.enumeration import RewardTable
    from grip_env.envs.rendering import Panel, draw_selection, gallery
    from grip_env.envs.rewards import REWARDS, AnswerLogLikelihood, AnswerProbability, ExactMatch, Reward
    from grip_env.envs.selection import TokenSelectionEnv
    from grip_env.envs.small import SmallSelectionEnv, SmallSelectionVectorEnv
    from grip_env.envs.vector import TokenSelectionVectorEnv
    from grip_env.tasks.base import Example, Task
    from grip_env.tasks.files import DataError, FileTask
    from grip_env.tasks.scenes import SceneTask
    from grip_env.vlms import load_vlm
    from grip_env.vlms.base import Encoded, FrozenVLM, Scores
    from grip_env.vlms.blocks import BlockVLM
    from grip_env.vlms.huggingface import HuggingFaceVLM

__version__ = "0.1.0"

_HOMES = {
    "AnswerLogLikelihood": "grip_env.envs.rewards",
    "AnswerProbability": "grip_env.envs.rewards",
    "BlockVLM": "grip_env.vlms.blocks",
    "DataError": "grip_env.tasks.files",
    "Encoded": "grip_env.vlms.base",
    "ExactMatch": "grip_env.envs.rewards",
    "Example": "grip_env.tasks.base",
    "FileTask": "grip_env.tasks.files",
    "FrozenVLM": "grip_env.vlms.base",
    "HuggingFaceVLM": "grip_env.vlms.huggingface",
    "Panel": "grip_env.envs.rendering",
    "REWARDS": "grip_env.envs.rewards",
    "Reward": "grip_env.envs.rewards",
    "RewardTable": "grip_env.envs.enumeration",
    "SceneTask": "grip_env.tasks.scenes",
    "Scores": "grip_env.vlms.base",
    "SmallSelectionEnv": "grip_env.envs.small",
    "SmallSelectionVectorEnv": "grip_env.envs.small",
    "Task": "grip_env.tasks.base",
    "TokenSelectionEnv": "grip_env.envs.selection",
    "TokenSelectionVectorEnv": "grip_env.envs.vector",
    "draw_selection": "grip_env.envs.rendering",
    "gallery": "grip_env.envs.rendering",
    "load_vlm": "grip_env.vlms",
}

__all__ = [
    "REWARDS",
    "AnswerLogLikelihood",
    "AnswerProbability",
    "BlockVLM",
    "DataError",
    "Encoded",
    "ExactMatch",
    "Example",
    "FileTask",
    "FrozenVLM",
    "HuggingFaceVLM",
    "Panel",
    "Reward",
    "RewardTable",
    "SceneTask",
    "Scores",
    "SmallSelectionEnv",
    "SmallSelectionVectorEnv",
    "Task",
    "TokenSelectionEnv",
    "TokenSelectionVectorEnv",
    "__version__",
    "draw_selection",
    "gallery",
    "load_vlm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


for _name, _single, _vector in (
    ("TokenSelection", "selection:TokenSelectionEnv", "vector:TokenSelectionVectorEnv"),
    ("SmallSelection", "small:SmallSelectionEnv", "small:SmallSelectionVectorEnv"),
):
    if f"GRIP/{_name}-v0" not in gymnasium.registry:  # a reload would warn
        gymnasium.register(
            id=f"GRIP/{_name}-v0",
            entry_point=f"grip_env.envs.{_single}",
            vector_entry_point=f"grip_env.envs.{_vector}",
        )
