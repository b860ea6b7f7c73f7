"""Agents that choose visual tokens: GRPO, training-free pruners, and what they are made of."""

DISTRIBUTION = "grip-env"
"""Tells this package from others of the same name; see ``grip_env.commands.check_agents_package``."""
