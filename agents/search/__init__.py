"""Reference policies that USE THE ANSWER: they try selections on the frozen model and keep the best they find.

They are no rivals of a pruner, which has to choose before anything is known of the answer; they tell how good a
selection can be, and at what price. Every name in a table says so ("uses the answer").

The price is counted in *calls*: selections scored, for each example. A search never makes more than its budget
``calls``, and tells how many it made and why it stopped. All examples of a batch advance together: a round scores the
candidates of all of them in one call of the model. Of equally good tokens, the one with the lower index is kept.

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
