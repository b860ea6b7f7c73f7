"""One episode of token selection: keep a tenth of a scene's visual tokens.

Run with ``python examples/quickstart.py``; it writes ``quickstart.png``.
"""

import gymnasium
from PIL import Image

import grip_env  # noqa: F401  (importing it registers the environment)

env = gymnasium.make("GRIP/TokenSelection-v0", split="test", budget=0.1, action_mode="scores", render_mode="rgb_array")
observation, info = env.reset(seed=3)
print(f"question: {env.unwrapped.example.question}")
print(f"the agent sees {len(observation['tokens'])} visual tokens and may keep {info['k']} of them")

# An action is one score per token; the k highest are kept. Here: how strongly each token stands out.
tokens = observation["tokens"]
action = ((tokens - tokens.mean(0)) ** 2).sum(1)
action = 2 * (action - action.min()) / (action.max() - action.min()) - 1

observation, reward, terminated, truncated, info = env.step(action)
print(
    f"log-likelihood of the right answer: {info['log_likelihood']:.3f} (all tokens: {info['full_log_likelihood']:.3f})"
)
print(f"reward: {reward:.3f}, answered correctly: {info['correct']}")

Image.fromarray(env.render()).save("quickstart.png")
print("wrote quickstart.png")
env.close()
