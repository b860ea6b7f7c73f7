"""Gymnasium environments for learning to prune the visual tokens of a frozen VLM.

Importing this package registers the environments ``GRIP/...-v0``. Anything heavier than Gymnasium is imported only
when it is used.

The subpackages, in the order in which data pass through them; none imports from a later one:

- ``common``: atomic file writes, signals, checks;
- ``tasks``: images with questions and answers; ``vlms``: the frozen models; ``pretraining``: training of the embedded
  model;
- ``rewards``: the value of a selection; ``exact``: every selection of small instances; ``envs``: the environments;
- ``run_folder``: the folder of a run; then the package ``agents``;
- ``reports``: comparisons of agents and methods; ``cli``, ``bench`` and the commands, such as
  ``python -m grip_env.train``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if sys.argv[:1] == ["-m"] and any(word.startswith("grip_env.") for word in sys.orig_argv):
    # python -m grip_env.COMMAND imports this package first, so Ctrl-C is handled from here on
    from grip_env.common.stopping import quit_while_starting

    quit_while_starting()

import gymnasium

from grip_env.common.lazy import public_names

if TYPE_CHECKING:
    from grip_env.envs.core.rendering import Panel, draw_selection, gallery
    from grip_env.envs.progressive import ProgressivePruningEnv, ProgressivePruningVectorEnv
    from grip_env.envs.sb3 import as_sb3_vec_env
    from grip_env.envs.selection import TokenSelectionEnv, TokenSelectionVectorEnv
    from grip_env.envs.sequential import SequentialSelectionEnv, SequentialSelectionVectorEnv
    from grip_env.envs.small import SmallSelectionEnv, SmallSelectionVectorEnv
    from grip_env.exact.reward_table import RewardTable
    from grip_env.reports.comparison import Comparison, compare
    from grip_env.rewards.terms import (
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
    from grip_env.tasks.base import Example, Task
    from grip_env.tasks.files import DataError, FileTask
    from grip_env.tasks.scenes import SceneTask
    from grip_env.vlms import load_vlm
    from grip_env.vlms.base import Encoded, FrozenVLM, Scores
    from grip_env.vlms.blocks import BlockVLM
    from grip_env.vlms.cache.images import PictureCache
    from grip_env.vlms.decoder.staged_forward import StagedForward
    from grip_env.vlms.huggingface import HuggingFaceVLM

__version__ = "0.1.0"

_HOMES = {
    "AgreementWithFull": "grip_env.rewards.terms",
    "AnswerLogLikelihood": "grip_env.rewards.terms",
    "AnswerProbability": "grip_env.rewards.terms",
    "ComposableReward": "grip_env.rewards.terms",
    "BlockVLM": "grip_env.vlms.blocks",
    "Comparison": "grip_env.reports.comparison",
    "DataError": "grip_env.tasks.files",
    "Encoded": "grip_env.vlms.base",
    "ExactMatch": "grip_env.rewards.terms",
    "Example": "grip_env.tasks.base",
    "FileTask": "grip_env.tasks.files",
    "FrozenVLM": "grip_env.vlms.base",
    "HuggingFaceVLM": "grip_env.vlms.huggingface",
    "KeptFraction": "grip_env.rewards.terms",
    "Panel": "grip_env.envs.core.rendering",
    "PictureCache": "grip_env.vlms.cache.images",
    "ProgressivePruningEnv": "grip_env.envs.progressive",
    "ProgressivePruningVectorEnv": "grip_env.envs.progressive",
    "REWARDS": "grip_env.rewards.terms",
    "Reward": "grip_env.rewards.terms",
    "RewardTable": "grip_env.exact.reward_table",
    "SceneTask": "grip_env.tasks.scenes",
    "Scores": "grip_env.vlms.base",
    "SequentialSelectionEnv": "grip_env.envs.sequential",
    "SequentialSelectionVectorEnv": "grip_env.envs.sequential",
    "StagedForward": "grip_env.vlms.decoder.staged_forward",
    "SmallSelectionEnv": "grip_env.envs.small",
    "SmallSelectionVectorEnv": "grip_env.envs.small",
    "Task": "grip_env.tasks.base",
    "TokenSelectionEnv": "grip_env.envs.selection",
    "TokenSelectionVectorEnv": "grip_env.envs.selection",
    "WeightedSum": "grip_env.rewards.terms",
    "as_sb3_vec_env": "grip_env.envs.sb3",
    "compare": "grip_env.reports.comparison",
    "draw_selection": "grip_env.envs.core.rendering",
    "gallery": "grip_env.envs.core.rendering",
    "load_vlm": "grip_env.vlms",
}

__all__ = [
    "REWARDS",
    "AgreementWithFull",
    "AnswerLogLikelihood",
    "AnswerProbability",
    "BlockVLM",
    "Comparison",
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
    "PictureCache",
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
    "compare",
    "draw_selection",
    "gallery",
    "load_vlm",
]


__getattr__, __dir__ = public_names(__name__, _HOMES)


for _name, _module, _class, _preset in (
    ("TokenSelection", "selection", "TokenSelection", {}),
    ("TokenScores", "selection", "TokenSelection", {"action_mode": "scores"}),  # for tools that are given only an id
    ("SequentialSelection", "sequential", "SequentialSelection", {}),
    ("ProgressivePruning", "progressive", "ProgressivePruning", {}),
    ("SmallSelection", "small", "SmallSelection", {}),
):
    if f"GRIP/{_name}-v0" not in gymnasium.registry:  # registering again on a reload would warn
        gymnasium.register(
            f"GRIP/{_name}-v0",
            f"grip_env.envs.{_module}:{_class}Env",
            vector_entry_point=f"grip_env.envs.{_module}:{_class}VectorEnv",
            kwargs=dict(_preset),
        )
