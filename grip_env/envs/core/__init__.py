"""Code shared by all environments.

In the order of an episode: sampling, instances, features, rules, rendering, vectors.
"""
