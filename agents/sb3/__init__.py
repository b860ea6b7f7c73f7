"""Agents of Stable-Baselines3 on this project's environments: options, policies that read sets, training."""
