"""Exact analysis of instances small enough to score every selection."""
