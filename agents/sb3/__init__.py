"""Stable-Baselines3 agents for this project's environments: options, policies, training."""
