"""What a selection is worth: rewards and their sums, as objects and as text."""
