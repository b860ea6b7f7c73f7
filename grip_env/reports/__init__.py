"""Comparison of agents and methods: loading of saved runs, tables and pictures."""
