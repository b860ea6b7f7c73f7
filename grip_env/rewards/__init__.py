"""Rewards of selections, and sums of them, as objects and as text."""
