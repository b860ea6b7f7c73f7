"""Measurements of cost: the environments beside the model (speed), pruning beside the whole picture (latency)."""
