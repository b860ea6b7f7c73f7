"""Reinforcement learning on visual-token pruning: Gymnasium environments around a frozen VLM.

Importing this package registers the environments ``GRIP/...-v0``. What is heavier than
Gymnasium loads when used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"] and any(word.startswith("grip_env.") for word in sys.orig_argv):
    # python -m grip_env.COMMAND imports this package first: Ctrl-C is dealt with from here on
    from grip_env.stopping import quit_while_starting

    quit_while_starting()

import gymnasium

if TYPE_CHECKING:
    from grip_env.envs.enumeration import RewardTable
    from grip_env.envs.progressive import ProgressivePruningEnv
    from grip_env.envs.progressive_vector import ProgressivePruningVectorEnv
    from grip_env.envs.rendering import Panel, draw_selection, gallery
    from grip_env.envs.rewards import (
        REWARDS,
        AgreementWithFull,
        AnswerLogLikelihood,
        AnswerProbability,
        ComposableReward,
        ExactMatch,
        KeptFraction,
        Reward,
        WeightedSum,
    )
    from grip_env.envs.sb3 import as_sb3_vec_env
    from grip_env.envs.selection import TokenSelectionEnv
    from grip_env.envs.sequential import SequentialSelectionEnv, SequentialSelectionVectorEnv
    from grip_env.envs.small import SmallSelectionEnv, SmallSelectionVectorEnv
    from grip_env.envs.vector import TokenSelectionVectorEnv
    from grip_env.tasks.base import Example, Task
    from grip_env.tasks.files import DataError, FileTask
    from grip_env.tasks.scenes import SceneTask
    from grip_env.vlms import load_vlm
    from grip_env.vlms.base import Encoded, FrozenVLM, Scores
    from grip_env.vlms.blocks import BlockVLM
    from grip_env.vlms.huggingface import HuggingFaceVLM
    from grip_env.vlms.staged import StagedForward

__version__ = "0.1.0"

_HOMES = {
    "AgreementWithFull": "grip_env.envs.rewards",
    "AnswerLogLikelihood": "grip_env.envs.rewards",
    "AnswerProbability": "grip_env.envs.rewards",
    "ComposableReward": "grip_env.envs.rewards",
    "BlockVLM": "grip_env.vlms.blocks",
    "DataError": "grip_env.tasks.files",
    "Encoded": "grip_env.vlms.base",
    "ExactMatch": "grip_env.envs.rewards",
    "Example": "grip_env.tasks.base",
    "FileTask": "grip_env.tasks.files",
    "FrozenVLM": "grip_env.vlms.base",
    "HuggingFaceVLM": "grip_env.vlms.huggingface",
    "KeptFraction": "grip_env.envs.rewards",
    "Panel": "grip_env.envs.rendering",
    "ProgressivePruningEnv": "grip_env.envs.progressive",
    "ProgressivePruningVectorEnv": "grip_env.envs.progressive_vector",
    "REWARDS": "grip_env.envs.rewards",
    "Reward": "grip_env.envs.rewards",
    "RewardTable": "grip_env.envs.enumeration",
    "SceneTask": "grip_env.tasks.scenes",
    "Scores": "grip_env.vlms.base",
    "SequentialSelectionEnv": "grip_env.envs.sequential",
    "SequentialSelectionVectorEnv": "grip_env.envs.sequential",
    "StagedForward": "grip_env.vlms.staged",
    "SmallSelectionEnv": "grip_env.envs.small",
    "SmallSelectionVectorEnv": "grip_env.envs.small",
    "Task": "grip_env.tasks.base",
    "TokenSelectionEnv": "grip_env.envs.selection",
    "TokenSelectionVectorEnv": "grip_env.envs.vector",
    "WeightedSum": "grip_env.envs.rewards",
    "as_sb3_vec_env": "grip_env.envs.sb3",
    "draw_selection": "grip_env.envs.rendering",
    "gallery": "grip_env.envs.rendering",
    "load_vlm": "grip_env.vlms",
}

__all__ = [
    "REWARDS",
    "AgreementWithFull",
    "AnswerLogLikelihood",
    "AnswerProbability",
    "BlockVLM",
    "ComposableReward",
    "DataError",
    "Encoded",
    "ExactMatch",
    "Example",
    "FileTask",
    "FrozenVLM",
    "HuggingFaceVLM",
    "KeptFraction",
    "Panel",
    "ProgressivePruningEnv",
    "ProgressivePruningVectorEnv",
    "Reward",
    "RewardTable",
    "SceneTask",
    "Scores",
    "SequentialSelectionEnv",
    "SequentialSelectionVectorEnv",
    "SmallSelectionEnv",
    "SmallSelectionVectorEnv",
    "StagedForward",
    "Task",
    "TokenSelectionEnv",
    "TokenSelectionVectorEnv",
    "WeightedSum",
    "__version__",
    "as_sb3_vec_env",
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


_TOKENS = "selection:TokenSelectionEnv", "vector:TokenSelectionVectorEnv"

for _name, (_single, _vector), _preset in (
    ("TokenSelection", _TOKENS, {}),
    ("TokenScores", _TOKENS, {"action_mode": "scores"}),  # for what can be told nothing but an id
    ("SequentialSelection", ("sequential:SequentialSelectionEnv", "sequential:SequentialSelectionVectorEnv"), {}),
    (
        "ProgressivePruning",
        ("progressive:ProgressivePruningEnv", "progressive_vector:ProgressivePruningVectorEnv"),
        {},
    ),
    ("SmallSelection", ("small:SmallSelectionEnv", "small:SmallSelectionVectorEnv"), {}),
):
    if f"GRIP/{_name}-v0" not in gymnasium.registry:  # a reload would warn
        gymnasium.register(
            f"GRIP/{_name}-v0",
            f"grip_env.envs.{_single}",
            vector_entry_point=f"grip_env.envs.{_vector}",
            kwargs=dict(_preset),
        )
