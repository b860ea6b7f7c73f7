"""Invented input for every door: rows of data, agents, configurations, actions, options.

Each test draws ``EXAMPLES`` inputs; ``make fuzz`` draws many more.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
"""Decorates a test that draws examples: the same ones in every run."""
