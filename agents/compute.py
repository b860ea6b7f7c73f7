"""What training costs, in one unit for all algorithms: forward passes of the language model."""

from __future__ import annotations

__all__ = ["BACKWARD", "Compute"]

BACKWARD = 3
"""Forward passes that one forward and backward pass together are worth: the backward pass computes two products of
matrices for each one of the forward pass (Kaplan et al., "Scaling laws for neural language models", 2020, section 2.1).
"""


class Compute:
    """Counts forward-equivalents: how often a language model has read one selection of one example.

    One selection scored counts 1, whatever it keeps, and so does the full image, by which an example enters the pool.
    One read forwards and backwards, as for a gradient with respect to the visual tokens, counts :data:`BACKWARD`. What
    runs once per image in every algorithm, the vision encoder, is not counted, and neither is the scorer's own work:
    ``seconds`` in the logs has them.

    >>> compute = Compute()
    >>> compute.add(32)  # 32 selections scored
    >>> compute.add(8, backward=True)  # 8 gradients
    >>> compute.forwards
    56
    """

    def __init__(self) -> None:
        self.forwards = 0
        """Forward-equivalents so far."""

    def add(self, count: int, backward: bool = False) -> None:
        """Count selections that the language model has read.

        Args:
            count: How many, B * G for a batch.
            backward: Whether a gradient was computed through the language model as well.

        Raises:
            ValueError: If there are fewer than 0.
        """
        if count < 0:
            raise ValueError(f"count must be at least 0; got {count}")
        self.forwards += count * (BACKWARD if backward else 1)
