"""Agents that choose visual tokens: GRPO, other trained agents and training-free pruners.

The modules, in the order in which training uses them:

- ``base`` (policies and selectors), ``scorer`` (the network), ``subset`` and ``ordered_subset`` (its distributions over
  selections), ``selectors`` (a trained scorer as a policy);
- ``pool`` (training examples), ``learning`` (code shared by all training), ``training`` (imitation, relaxations,
  options), ``grpo``, and ``sb3`` (Stable-Baselines3);
- ``heuristics`` (training-free pruners), ``search`` (references that use the answer), ``methods`` (both by name);
- ``agent`` (the algorithms of ``--algo``), ``saved`` (agents of runs), ``pruner`` (a model with a trained agent).

The names below are public and are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grip_env.common.lazy import public_names

if TYPE_CHECKING:
    from agents.agent import Agent, Setting, find_algorithm, register
    from agents.base import Policy, PolicySelector, Selector, keep_best
    from agents.grpo import GRPO, RLOO, GRPOConfig, Reinforce
    from agents.heuristics import BASELINES
    from agents.learning import Metrics
    from agents.methods import METHODS, find_method
    from agents.ordered_subset import OrderedSubset
    from agents.pool import ExamplePool
    from agents.pruner import PRETRAINED, Pruner
    from agents.scorer import Scorer, ScorerConfig
    from agents.selectors import ScorerPolicy, ScorerSelector
    from agents.subset import KSubset

DISTRIBUTION = "grip-env"
"""Name that identifies this package among others called ``agents``; see ``grip_env.cli.check_agents_package``."""

_HOMES = {
    "Agent": "agents.agent",
    "BASELINES": "agents.heuristics",
    "ExamplePool": "agents.pool",
    "GRPO": "agents.grpo",
    "GRPOConfig": "agents.grpo",
    "KSubset": "agents.subset",
    "METHODS": "agents.methods",
    "Metrics": "agents.learning",
    "OrderedSubset": "agents.ordered_subset",
    "PRETRAINED": "agents.pruner",
    "Policy": "agents.base",
    "PolicySelector": "agents.base",
    "Pruner": "agents.pruner",
    "RLOO": "agents.grpo",
    "Reinforce": "agents.grpo",
    "Scorer": "agents.scorer",
    "ScorerConfig": "agents.scorer",
    "ScorerPolicy": "agents.selectors",
    "ScorerSelector": "agents.selectors",
    "Selector": "agents.base",
    "Setting": "agents.agent",
    "find_algorithm": "agents.agent",
    "find_method": "agents.methods",
    "keep_best": "agents.base",
    "register": "agents.agent",
}

__all__ = [
    "BASELINES",
    "GRPO",
    "METHODS",
    "PRETRAINED",
    "RLOO",
    "Agent",
    "ExamplePool",
    "GRPOConfig",
    "KSubset",
    "Metrics",
    "OrderedSubset",
    "Policy",
    "PolicySelector",
    "Pruner",
    "Reinforce",
    "Scorer",
    "ScorerConfig",
    "ScorerPolicy",
    "ScorerSelector",
    "Selector",
    "Setting",
    "find_algorithm",
    "find_method",
    "keep_best",
    "register",
]


__getattr__, __dir__ = public_names(__name__, _HOMES)
