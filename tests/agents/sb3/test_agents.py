"""PPO, A2C and MaskablePPO as algorithms of the project."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecMonitor

from agents.agent import Agent, Setting, find_algorithm
from agents.sb3.set_policy import SetExtractor
from agents.scorer import Scorer
from agents.selectors import ScorerSelector
from agents.training.imitation import Imitation, as_warm_up
from grip_env import as_sb3_vec_env
from grip_env.rewards.parsing import resolve_reward
from tests.fakes import FakeTask, FakeVLM

NAMES = ["ppo", "a2c", "maskable-ppo"]


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow and of one block: what is looked at here does not depend on their size, and time does."""
    monkeypatch.setattr(SetExtractor.__init__, "__defaults__", (32, 1, 2))


def options(name: str, **changes: Any) -> Any:
    tiny: dict[str, Any] = {
        "steps": 3,
        "num_envs": 4,
        "n_steps": 4,
        "warmup_steps": 0,
        "examples": 10,
        "instances": 6,
        "pool": 8,
        "max_question_tokens": 8,
    }
    if name != "a2c":
        tiny["batch_size"] = 8
    return find_algorithm(name).Options(**tiny | changes)  # type: ignore[attr-defined]


def make(
    name: str, vlm: Any = None, task: Any = None, seed: int = 0, reward: str = "log_likelihood", **changes: Any
) -> Any:
    setting = Setting(vlm or FakeVLM(), task or FakeTask(), resolve_reward(reward), seed=seed)
    return find_algorithm(name)(setting, options(name, **changes))


def weights(agent: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in agent.model.policy.named_parameters()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(value.equal(two[name]) for name, value in one.items())


def timeless(metrics: Any) -> dict[str, float]:
    return {key: value for key, value in metrics.values.items() if key != "seconds"}


def choose(agent: Any, kept: int = 3, vlm: Any = None) -> torch.Tensor:
    vlm, task = vlm or FakeVLM(), FakeTask()
    encoded = vlm.encode([task.example("test", index) for index in range(6)])
    chosen = agent(vlm, encoded, torch.full((6,), kept), torch.Generator())
    assert chosen.sum(1).tolist() == [kept] * 6
    return chosen


@pytest.mark.parametrize("name", NAMES)
def test_they_are_agents(name: str) -> None:
    agent = make(name)
    assert isinstance(agent, Agent)
    assert agent.phases == {"warmup": 0, name: 3}
    steps = list(agent.learn())
    assert [(each.phase, each.step) for each in steps] == [(name, 0), (name, 1), (name, 2)]
    assert len({tuple(each.values) for each in steps}) == 1
    for each in steps:
        assert all(np.isfinite(value) for value in each.values.values())
        assert {"reward", "log_likelihood", "accuracy", "forwards", "seconds"} <= each.values.keys()


# -- learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ppo", {}),
        ("ppo", {"action_mode": "scores"}),
        ("a2c", {"steps": 50, "learning_rate": 1e-2, "n_steps": 4}),
        ("maskable-ppo", {}),
        ("maskable-ppo", {"dense": False}),
    ],
)
def test_they_learn_which_tokens_matter(name: str, changes: dict[str, Any]) -> None:
    """One picture with 3 tokens that matter, and room for 2."""
    task = FakeTask(1)
    big: dict[str, Any] = {"steps": 25, "num_envs": 32, "n_steps": 2, "learning_rate": 3e-3, "examples": 1}
    if name != "a2c":
        big["batch_size"] = 32
    agent = make(name, task=task, min_budget=0.125, max_budget=0.125, **big | changes)
    steps = list(agent.learn())
    vlm = FakeVLM()
    encoded = vlm.encode([task.example("train", 0)])
    chosen = agent(vlm, encoded, torch.tensor([2]), torch.Generator())
    at_random = -2.0 + 1.9 * 2 / 16 - 0.001 * 2 * 13 / 16
    learnt = [each.values["log_likelihood"] for each in steps]
    assert learnt[0] == pytest.approx(at_random, abs=0.2)
    assert np.mean(learnt[-5:]) > at_random + 0.35
    assert float(vlm.log_likelihood(encoded, chosen[:, None])) > -2.0 + 1.9 / 3 - 0.002  # one of the three at least


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_gives_the_same_whatever_else_draws_random_numbers(name: str) -> None:
    runs = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        agent = make(name, seed=seed)
        logged = []
        for each in agent.learn():
            torch.rand(disturbance)
            np.random.rand(disturbance)  # noqa: NPY002
            logged.append(timeless(each))
        runs.append((logged, weights(agent)))
    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_global_generators_are_left_as_they_were() -> None:
    def state() -> list[Any]:
        numpy = np.random.get_state()  # noqa: NPY002
        return [random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()]  # type: ignore[index,union-attr]

    before = state()
    list(make("ppo").learn())
    assert state() == before


@pytest.mark.parametrize("name", ["ppo", "maskable-ppo"])
def test_update_by_update_is_one_long_training(name: str) -> None:
    """The library's own ``learn`` in one call: the same rollouts, updates and random numbers."""
    agent = make(name, steps=5, anneal=False)
    list(agent.learn())
    settings, setting = agent.options, Setting(FakeVLM(), FakeTask(), resolve_reward("log_likelihood"))
    common: dict[str, Any] = {"budget": (0.03, 0.5), "obs_dtype": "float16", "max_question_tokens": 8}
    library, policy = agent._algorithm()
    kinds = {"ppo": "GRIP/TokenSelection-v0", "maskable-ppo": "GRIP/SequentialSelection-v0"}
    around = dataclasses.replace(setting, task=agent.model.env.venv.envs.unwrapped.rules.task)
    model = library(
        policy,
        VecMonitor(as_sb3_vec_env(around.make_vec(kinds[name], 4, **common))),
        learning_rate=settings.learning_rate,
        n_steps=4,
        batch_size=8,
        n_epochs=settings.epochs,
        gamma=1.0,
        gae_lambda=settings.gae_lambda,
        max_grad_norm=settings.max_gradient_norm,
        seed=0,
        device="cpu",
    )
    model.learn(5 * 16)
    assert equal(weights(agent), {name: value.detach() for name, value in model.policy.named_parameters()})
    assert agent.model.num_timesteps == model.num_timesteps == 80


def test_learning_rate_falls_along_a_line() -> None:
    agent = make("ppo", steps=4, learning_rate=8e-4)
    seen = []
    for each in agent.learn():
        seen.append((each.values["learning_rate"], agent.model.policy.optimizer.param_groups[0]["lr"]))
    assert seen == [(pytest.approx(rate), pytest.approx(rate)) for rate in (8e-4, 6e-4, 4e-4, 2e-4)]


# -- what it costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"), [("ppo", {}), ("a2c", {}), ("maskable-ppo", {}), ("maskable-ppo", {"dense": False})]
)
def test_the_model_is_called_once_per_step_and_every_selection_counted(name: str, changes: dict[str, Any]) -> None:
    vlm = FakeVLM()
    agent = make(name, vlm, **changes)
    last = list(agent.learn())[-1]
    assert last.values["forwards"] == sum(rows * group for rows, group, _ in vlm.score_calls) > 0
    steps = 3 * 4
    assert len(vlm.score_calls) <= steps + 1  # a reset scores the full images
    if name != "maskable-ppo":
        assert len(vlm.score_calls) == steps + 1
        # the full image of each example once, then one selection for each environment and step
        assert last.values["forwards"] == 10 + 4 * steps
    assert len(vlm.encode_calls) <= steps + 2  # the first example tells the number of tokens


def test_a_part_of_the_split_is_seen_and_only_that() -> None:
    class Noting(FakeTask):
        seen: set[int] = set()  # noqa: RUF012

        def example(self, split: str, index: int) -> Any:
            self.seen.add(index)
            return super().example(split, index)

    parts = []
    for seed in (0, 1):
        Noting.seen.clear()
        list(make("ppo", task=Noting(1000), examples=7, seed=seed).learn())
        parts.append(set(Noting.seen))
    assert [len(part) for part in parts] == [7, 7]
    assert parts[0] != parts[1]
    assert max(parts[0]) > 10
    Noting.seen.clear()
    list(make("ppo", task=Noting(1000), examples=0).learn())
    assert len(Noting.seen) > 40


# -- warm-up ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_is_that_of_the_other_algorithms(name: str, tmp_path: Path) -> None:
    agent = make(name, warmup_steps=4, steps=2, teacher="relevance")
    twin = Scorer(agent.scorer.config)
    twin.load_state_dict(agent.scorer.state_dict())
    setting = Setting(FakeVLM(), FakeTask(), resolve_reward("log_likelihood"))
    alone = Imitation(setting.vlm, setting.pool(8, 4), twin, as_warm_up(agent.options), seed=0)
    expected = [timeless(each) for each in alone.imitate("warmup")]
    logged = agent.learn()
    assert [timeless(next(logged)) for _ in range(4)] == expected
    assert all(value.equal(twin.state_dict()[key]) for key, value in agent.scorer.state_dict().items())
    agent.save(tmp_path)  # as train does: what evaluate shows as the run's warm-up
    assert ScorerSelector(Scorer.load(tmp_path))(
        FakeVLM(), FakeVLM().encode([FakeTask().example("test", 0)]), torch.tensor([3]), torch.Generator()
    ).equal(choose(agent)[:1])
    after = next(logged)
    assert (after.phase, after.step) == (name, 0)
    assert after.values["forwards"] > expected[-1]["forwards"]


# -- on disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_chooses_as_what_was_saved(name: str, tmp_path: Path) -> None:
    agent = make(name, learning_rate=1e-2)
    list(agent.learn())
    agent.save(tmp_path)
    loaded = find_algorithm(name).load(tmp_path, FakeVLM())
    for kept in (1, 5, 16):
        assert choose(loaded, kept).equal(choose(agent, kept))
    assert {path.name for path in tmp_path.iterdir()} == {"scorer.json", "scorer.safetensors", "training.safetensors"}
    assert all(path.read_bytes()[:2] != b"PK" for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_resuming_restores_weights_optimiser_and_schedule(name: str, tmp_path: Path) -> None:
    agent = make(name, steps=4, warmup_steps=2, teacher="relevance")
    logged = agent.learn()
    for _ in range(2 + 2):
        last = next(logged)
    agent.save(tmp_path)
    resumed = []
    for _ in range(2):
        other = make(name, steps=4, warmup_steps=2, teacher="relevance")
        other.resume(tmp_path)
        assert equal(weights(other), weights(agent))
        one, two = (each.model.policy.optimizer.state_dict()["state"] for each in (agent, other))
        assert one.keys() == two.keys() != set()
        for index, held in one.items():
            assert all(torch.as_tensor(value).equal(two[index][key]) for key, value in held.items())
        assert other.compute.forwards == agent.compute.forwards
        rest = list(other.learn())
        assert [(each.phase, each.step) for each in rest] == [(name, 2), (name, 3)]
        assert rest[0].values["forwards"] > last.values["forwards"]
        resumed.append(([timeless(each) for each in rest], weights(other)))
    straight = list(logged)
    assert [each.values["learning_rate"] for each in straight] == [each["learning_rate"] for each in resumed[0][0]]
    assert resumed[0][0] == resumed[1][0]
    assert equal(resumed[0][1], resumed[1][1])


def test_resuming_refuses_what_does_not_fit_and_changes_nothing(tmp_path: Path) -> None:
    agent = make("ppo")
    list(agent.learn())
    agent.save(tmp_path)
    with pytest.raises(ValueError, match="has begun to learn"):
        agent.resume(tmp_path)
    fresh = make("ppo", action_mode="scores")
    before = weights(fresh)
    with pytest.raises(ValueError, match=r"another kind .*give the options"):
        fresh.resume(tmp_path)
    with pytest.raises(ValueError, match="written by ppo, and this is a2c"):
        make("a2c").resume(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"training\.safetensors"):
        fresh.resume(tmp_path / "nowhere")
    path = tmp_path / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="is damaged"):
        fresh.resume(tmp_path)
    assert equal(weights(fresh), before)
    assert fresh.updates == 0


def test_loading_refuses_what_is_damaged_or_of_another_model(tmp_path: Path) -> None:
    class Wider(FakeVLM):
        width = 9

    for name in NAMES:
        folder = tmp_path / name
        with pytest.raises(FileNotFoundError):
            find_algorithm(name).load(folder, FakeVLM())
        make(name).save(folder)
        with pytest.raises(ValueError, match="width 8"):
            find_algorithm(name).load(folder, Wider())
    with pytest.raises(ValueError, match="not written by maskable-ppo"):
        find_algorithm("maskable-ppo").load(tmp_path / "ppo", FakeVLM())
    path = tmp_path / "maskable-ppo" / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="is damaged"):
        find_algorithm("maskable-ppo").load(tmp_path / "maskable-ppo", FakeVLM())


# -- the library's own side ------------------------------------------------------------------------------


class Infos(BaseCallback):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.seen += self.locals["infos"]
        return True


def test_no_illegal_action_is_taken() -> None:
    agent = make("maskable-ppo", FakeVLM(count=lambda example: 7 + int(example.key[-1])), max_tokens=18)
    callback = Infos()
    agent.model.learn(64, callback)
    assert len(callback.seen) == 64
    assert all(info["invalid_actions"] == 0 for info in callback.seen)


@pytest.mark.parametrize("name", NAMES)
def test_the_librarys_predict_takes_observations_of_the_environment(name: str) -> None:
    agent = make(name)
    list(agent.learn())
    setting = Setting(FakeVLM(), FakeTask(), resolve_reward("log_likelihood"))
    single = setting.make_vec(agent.environment, 1, max_question_tokens=8)
    observations, _ = single.reset(seed=0)
    actions, _ = agent.model.predict({key: value[0] for key, value in observations.items()}, deterministic=True)
    assert single.single_action_space.contains(np.asarray(actions, dtype=single.single_action_space.dtype))


@pytest.mark.parametrize("name", NAMES)
def test_576_tokens_take_one_update(name: str) -> None:
    class Finer(FakeTask):
        def example(self, split: str, index: int) -> Any:
            example = super().example(split, index)
            return dataclasses.replace(example, image=example.image.repeat(4, 0).repeat(4, 1))

    agent = make(name, FakeVLM(24), Finer(), steps=2, num_envs=2, n_steps=4, max_budget=0.01, min_budget=0.005)
    first, second = agent.learn()
    assert np.isfinite([*first.values.values(), *second.values.values()]).all()
    stored = agent.model.rollout_buffer.observations["tokens"]
    assert stored.nbytes == 2 * 4 * 576 * 8 * 2
    assert sum(value.numel() for value in agent.model.policy.parameters()) == sum(
        value.numel() for value in make(name).model.policy.parameters()
    )


# -- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ppo", {"steps": -1}, "steps must be at least 0; got -1"),
        ("ppo", {"num_envs": 0}, "num_envs must be at least 1; got 0"),
        ("ppo", {"batch_size": 5}, r"batch_size must divide num_envs \* n_steps = 4 \* 4 = 16; got 5"),
        ("maskable-ppo", {"batch_size": 1}, "batch_size must be at least 2; got 1"),
        ("a2c", {"learning_rate": 0.0}, "learning_rate must be above 0"),
        ("a2c", {"num_envs": 1, "n_steps": 1}, "normalize_advantage needs at least 2 steps"),
        ("a2c", {"min_budget": 0.9}, "0 < min_budget <= max_budget <= 1"),
        ("ppo", {"gamma": 1.1}, r"gamma must be from 0 to 1; got 1\.1"),
        ("ppo", {"target_kl": 0.0}, "target_kl must be above 0"),
        ("ppo", {"action_mode": "top"}, "action_mode must be 'binary' or 'scores'; got 'top'"),
        ("ppo", {"obs_dtype": "int8"}, "obs_dtype must be"),
        ("ppo", {"log_std_init": float("nan")}, "log_std_init must be finite"),
        ("a2c", {"over_budget_penalty": -1.0}, "over_budget_penalty must be"),
        ("ppo", {"instances": 9}, "instances=9 and pool=8"),
        ("ppo", {"warmup_steps": 3, "teacher": "nobody"}, "unknown teacher 'nobody'"),
        ("maskable-ppo", {"steps": 1, "n_steps": 4, "max_budget": 1.0}, r"16 steps.*steps \* n_steps = 1 \* 4 = 4"),
    ],
)
def test_impossible_options_are_refused_at_once(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **changes)


def test_what_maskable_ppo_lacks_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make("maskable-ppo").save(tmp_path)
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(ValueError, match=r"needs sb3-contrib .*pip install 'grip-env\[contrib\]'") as error:
        make("maskable-ppo")
    assert "\n" not in str(error.value)
    choose(find_algorithm("maskable-ppo").load(tmp_path, FakeVLM()))  # to choose, it is not needed
