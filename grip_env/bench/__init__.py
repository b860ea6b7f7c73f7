"""Measurements of cost: the environments (speed) and the savings of pruning (latency)."""
