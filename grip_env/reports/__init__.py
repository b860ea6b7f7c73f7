"""Agents and methods compared: runs as they were saved, the comparison with its tables, and its pictures."""
