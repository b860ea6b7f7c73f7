"""Agents that choose visual tokens: GRPO, training-free pruners, and what they are made of."""
