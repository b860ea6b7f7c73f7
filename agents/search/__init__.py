"""Searches that USE THE ANSWER: they score selections with the model and keep the best.

They do not compete with pruners, which must choose without knowing the answer; they show how good a selection can be,
and at what cost. Their names in tables say so ("uses the answer").

The cost is counted in *calls*: selections scored for each example. A search never exceeds its budget ``calls``, and it
reports how many calls it made and why it stopped. All examples of a batch advance together: a round scores the
candidates of all of them in one call of the model. Among equally good tokens, the one with the lower index is kept.

```python
generator = torch.Generator().manual_seed(0)
found = GreedyForward(calls=500).search(vlm, encoded, budget_to_count(encoded, 0.05), generator)
print(found.value, found.calls, found.stopped)  # of each example
```
"""

from agents.search.base import Search, SearchResult
from agents.search.cross_entropy import CrossEntropy
from agents.search.local import ExactEnumeration, GreedyBackward, GreedyForward, RandomSearch, SwapSearch, removal_plan

__all__ = [
    "CrossEntropy",
    "ExactEnumeration",
    "GreedyBackward",
    "GreedyForward",
    "RandomSearch",
    "Search",
    "SearchResult",
    "SwapSearch",
    "removal_plan",
]
