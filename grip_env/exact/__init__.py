"""Instances small enough to score every selection: their optimum, and how rugged they are."""
