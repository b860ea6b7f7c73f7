"""PPO, A2C and MaskablePPO of Stable-Baselines3, as general-purpose baselines for GRPO.

They share GRPO's scorer network, warm-up and reward, and draw log-uniform budgets, but learn through the environment:
one action for each observation, and a learned value instead of a group. The environments step together, with one call
of the language model per step (:func:`grip_env.as_sb3_vec_env`).

Raffin et al., "Stable-Baselines3: Reliable Reinforcement Learning Implementations", JMLR 22, 2021.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecMonitor

from agents.agent import Setting, device_of, register
from agents.learning import Metrics
from agents.pool import ForwardCounter
from agents.sb3.callbacks import Anneal, Episodes, Randomness
from agents.sb3.checkpoint import TrainingState
from agents.sb3.options import A2COptions, MaskablePPOOptions, PPOOptions
from agents.sb3.set_policy import SequentialSelector, SetNetwork, SetPolicy
from agents.scorer import Scorer, ScorerConfig
from agents.selectors import ScorerSelector
from agents.training.imitation import Imitation, as_warm_up
from grip_env import as_sb3_vec_env
from grip_env.common.finite import NonFiniteError, check_finite, named_step
from grip_env.envs.core.sampling import shuffled_indices, tokens_in_budget
from grip_env.rewards.terms import needs_agreement
from grip_env.tasks.subset import TaskSubset
from grip_env.vlms.base import Encoded, FrozenVLM, Scores

__all__ = ["A2CAgent", "A2COptions", "MaskablePPOAgent", "MaskablePPOOptions", "PPOAgent", "PPOOptions"]

STATE = "training.safetensors"
NETWORK = "features_extractor.network."


class _Counting:
    """Wrapper of a frozen model that counts the selections scored.

    Args:
        vlm: The model.
        compute: Counter of forward passes.
    """

    def __init__(self, vlm: FrozenVLM, compute: ForwardCounter) -> None:
        self._vlm, self._compute = vlm, compute

    def score(self, encoded: Encoded, selection: torch.Tensor, *arguments: Any, **named: Any) -> Scores:
        self._compute.add(selection.shape[0] * selection.shape[1])
        return self._vlm.score(encoded, selection, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vlm, name)


class _LibraryAgent(ABC):
    """Base class of this project's agents that train with an algorithm of Stable-Baselines3.

    ``model`` is the library's object; ``model.predict`` takes observations of the environments.
    """

    Options: ClassVar[type]
    phase: ClassVar[str]
    environment: ClassVar[str] = "GRIP/TokenSelection-v0"

    def __init__(self, setting: Setting, options: Any) -> None:
        options.check()
        self.options, self._setting = options, setting
        device = device_of(setting.vlm)
        algorithm, policy = self._algorithm()
        self._pool = setting.pool(options.pool, options.reuse)
        self.compute = self._pool.compute
        """Forward passes of the language model, including the warm-up."""
        self._seed = setting.seed % 2**32  # NumPy takes no more
        self._randomness = Randomness(device)
        self._anneal = Anneal(options.learning_rate, options.steps if options.anneal else 0)
        self.phases = {"warmup": options.warmup_steps, self.phase: options.steps}
        """Number of steps of each phase."""
        counting: Any = _Counting(setting.vlm, self.compute)
        task: Any = setting.task
        if options.examples:
            size = task.size(setting.split)
            chosen = shuffled_indices(self._seed, 0, min(options.examples, size), size)
            task = TaskSubset(task, setting.split, chosen.tolist())
        around = dataclasses.replace(setting, vlm=counting, task=task)
        envs = around.make_vec(
            self.environment,
            options.num_envs,
            budget=(options.min_budget, options.max_budget),
            obs_dtype=options.obs_dtype,
            max_tokens=options.max_tokens,
            max_question_tokens=options.max_question_tokens,
            cache_size=options.examples or 2 * options.num_envs,
            **self._environment_options(),
        )
        longest = self._longest_episode(envs.single_observation_space["token_mask"].n)
        if 0 < options.steps * options.n_steps < longest:  # episodes might never end
            raise ValueError(
                f"an episode may take {longest} steps, and training ends after steps * n_steps = {options.steps} * "
                f"{options.n_steps} = {options.steps * options.n_steps}: give it more, or a smaller max_budget"
            )
        with self._randomness.lent():
            self.model: Any = algorithm(
                policy,
                VecMonitor(as_sb3_vec_env(envs)),
                learning_rate=self._anneal,
                n_steps=options.n_steps,
                gamma=options.gamma,
                gae_lambda=options.gae_lambda,
                ent_coef=options.entropy_weight,
                vf_coef=options.value_weight,
                max_grad_norm=options.max_gradient_norm,
                seed=self._seed,
                device=device,
                **self._library_options(),
            )
        self.model.set_logger(Logger(None, []))
        warm_up = as_warm_up(options)
        self._warm_up = Imitation(setting.vlm, self._pool, self.scorer, warm_up, setting.reward, setting.seed)
        self._warm, self.updates = False, 0
        self._episodes = Episodes()

    @classmethod
    @abstractmethod
    def _algorithm(cls) -> tuple[Any, Any]:
        """Return the library's algorithm class and the policy class."""

    def _environment_options(self) -> dict[str, Any]:
        return {"action_mode": self.options.action_mode, "over_budget_penalty": self.options.over_budget_penalty}

    def _library_options(self) -> dict[str, Any]:
        return {"policy_kwargs": {"log_std_init": self.options.log_std_init}}

    def _clipping(self) -> dict[str, Any]:
        own = self.options
        return {
            "batch_size": own.batch_size,
            "n_epochs": own.epochs,
            "clip_range": own.clip_range,
            "target_kl": own.target_kl,
        }

    def _longest_episode(self, tokens: int) -> int:
        return 1

    @property
    def network(self) -> SetNetwork:
        """The trained network without the heads."""
        return cast(SetNetwork, self.model.policy.features_extractor.network)

    @property
    def scorer(self) -> Scorer:
        """The scorer in the network."""
        return self.network.scorer

    def learn(self) -> Iterator[Metrics]:
        """Train from the current state, yielding after each step; see :class:`~agents.agent.Agent`.

        Logged at each update, over the episodes that ended in it (if none did, in the last update in which any did):
        ``reward``, ``log_likelihood``, ``accuracy`` and ``budget_used``, the share of the allowed tokens that were
        kept; from the library ``value_loss``, ``entropy`` (nats per action) and, for PPO, ``approx_kl`` and
        ``clip_fraction``; ``forwards`` and ``seconds`` as for every algorithm. Updates before the end of the first
        episode yield nothing; their seconds count towards the first update that does.
        """
        options = self.options
        if not self._warm:
            yield from self._warm_up.imitate("warmup", needs_agreement(self._setting.reward))
            self._warm = True
        started = time.perf_counter()
        while self.updates < options.steps:
            self._anneal.update = self.updates
            with named_step(self.phase, self.updates):
                try:
                    with self._randomness.lent():
                        # not reset: the rollout continues where the last one ended, as within one long call
                        self.model.learn(options.num_envs * options.n_steps, self._episodes, reset_num_timesteps=False)
                except ValueError as error:
                    if "Expected parameter" not in str(error):  # what torch.distributions say about NaN
                        raise
                    rate = self._anneal(0)
                    raise NonFiniteError(
                        f"the policy's outputs are NaN or infinite: try a learning rate below {rate:g}"
                    ) from error
                finally:  # of non-finite weights, in place of the library's error about distributions
                    check_finite(dict(self.model.policy.named_parameters()), "the agent")
            self.updates += 1
            if self._episodes.means:
                logged = {key.removeprefix("train/"): value for key, value in self.model.logger.name_to_value.items()}
                named = ("value_loss", "approx_kl", "clip_fraction")
                values = self._episodes.means | {key: float(logged[key]) for key in named if key in logged}
                values |= {
                    "entropy": -float(logged["entropy_loss"]),
                    "learning_rate": self._anneal(0),
                    "seconds": time.perf_counter() - started,
                    "forwards": self.compute.forwards,
                }
                yield Metrics(self.phase, self.updates - 1, values)
                started = time.perf_counter()

    def save(self, folder: Path) -> None:
        """Write the scorer and the training state that :meth:`resume` needs, without pickle."""
        self.scorer.save(folder)
        about = {
            "algorithm": self.phase,
            "warm": self._warm,
            "updates": self.updates,
            "forwards": self.compute.forwards,
            "scorer": dataclasses.asdict(self.scorer.config),
        }
        TrainingState.of(self.model.policy, self.model.policy.optimizer, about).write(folder / STATE)

    def resume(self, folder: Path) -> None:
        """Load a training state that :meth:`save` wrote, into a new agent with the same options.

        Call :meth:`learn` to continue. Weights, optimiser, the number of updates (and so the learning rate) and forward
        passes are restored. Random numbers and episodes are not: random numbers start from a new seed, made of the
        setting's seed and the number of updates, and unfinished episodes are dropped. An unfinished warm-up starts
        again, from the saved weights.

        Raises:
            FileNotFoundError: If there is no saved state.
            ValueError: If the state is damaged or from another algorithm, action mode or model, or if this agent has
                begun to learn; the agent is then unchanged.
        """
        if self._warm or self.updates or self.model.num_timesteps:
            raise ValueError("this agent has begun to learn: make a new one to resume with")
        state = TrainingState.read(folder / STATE)
        if state.about.get("algorithm") != self.phase:
            raise ValueError(
                f"{folder / STATE} was written by {state.about.get('algorithm')}, and this is {self.phase}: resume "
                "with the algorithm that wrote it"
            )
        about = {"warm": bool, "updates": int, "forwards": int}
        if any(type(state.about.get(name)) is not kind for name, kind in about.items()):
            raise ValueError(f"{folder / STATE} has no valid record of its progress: train again")
        state.restore(self.model.policy, self.model.policy.optimizer, str(folder / STATE))
        self._warm, self.updates = state.about["warm"], state.about["updates"]
        self.compute.add(state.about["forwards"])
        self.model.num_timesteps = self.updates * self.options.num_envs * self.options.n_steps
        seed = int(np.random.SeedSequence([self._seed, self.updates]).generate_state(1)[0])
        with self._randomness.lent():
            self.model.set_random_seed(seed)

    @classmethod
    def load(cls, folder: Path, vlm: FrozenVLM) -> Any:
        """Read what :meth:`save` wrote as a selector; see :class:`~agents.agent.Agent`."""
        scorer = Scorer.load(folder)
        scorer.check_width(vlm.width, folder, vlm.name)
        return ScorerSelector(scorer.to(device_of(vlm)))

    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose the most likely tokens; see :class:`agents.base.Selector`."""
        return ScorerSelector(self.scorer)(vlm, encoded, counts, generator)


@register("a2c")
class A2CAgent(_LibraryAgent):
    """A set-wise policy trained by A2C on the one-shot environment.

    It uses Adam. RMSProp, the default of the library's A2C, undoes a warm-up: its first steps are ten times its
    learning rate.
    """

    Options, phase = A2COptions, "a2c"

    @classmethod
    def _algorithm(cls) -> tuple[Any, Any]:
        return A2C, SetPolicy

    def _library_options(self) -> dict[str, Any]:
        normalize = self.options.normalize_advantage
        return super()._library_options() | {"use_rms_prop": False, "normalize_advantage": normalize}


@register("ppo")
class PPOAgent(_LibraryAgent):
    """A set-wise policy trained by PPO on the one-shot environment."""

    Options, phase = PPOOptions, "ppo"

    @classmethod
    def _algorithm(cls) -> tuple[Any, Any]:
        return PPO, SetPolicy

    def _library_options(self) -> dict[str, Any]:
        return super()._library_options() | self._clipping()


@register("maskable-ppo")
class MaskablePPOAgent(_LibraryAgent):
    """A set-wise policy trained by sb3-contrib's MaskablePPO on the token-by-token environment.

    Training needs the extra "contrib"; choosing tokens does not.
    """

    Options, phase = MaskablePPOOptions, "maskable-ppo"
    environment = "GRIP/SequentialSelection-v0"

    @classmethod
    def _algorithm(cls) -> tuple[Any, Any]:
        try:
            contrib: Any = importlib.import_module("sb3_contrib")
        except ImportError as error:
            raise ValueError(f"maskable-ppo needs sb3-contrib ({error}): pip install 'grip-env[contrib]'") from None
        from agents.sb3.masked_policy import MaskableSetPolicy

        return contrib.MaskablePPO, MaskableSetPolicy

    def _environment_options(self) -> dict[str, Any]:
        return {"dense": self.options.dense}

    def _library_options(self) -> dict[str, Any]:
        return self._clipping()

    def _longest_episode(self, tokens: int) -> int:
        return tokens_in_budget(self.options.max_budget, tokens)

    @classmethod
    def load(cls, folder: Path, vlm: FrozenVLM) -> SequentialSelector:
        """Read what :meth:`save` wrote as a selector; see :class:`~agents.agent.Agent`."""
        state = TrainingState.read(folder / STATE)
        try:
            if state.about["algorithm"] != cls.phase:
                raise KeyError(state.about["algorithm"])
            weights = {
                key.removeprefix(NETWORK): value for key, value in state.weights.items() if key.startswith(NETWORK)
            }
            network = SetNetwork(ScorerConfig.read(state.about["scorer"], weights, "scorer."))
            # strict: choosing needs all weights except the heads and the critic
            network.load_state_dict(weights)
        except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"{folder / STATE} was not written by maskable-ppo: train again") from error
        network.scorer.check_width(vlm.width, folder, vlm.name)
        return SequentialSelector(network.to(device_of(vlm)).eval())

    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Add the most likely token until the budget is used; see :class:`agents.base.Selector`."""
        return SequentialSelector(self.network)(vlm, encoded, counts, generator)
