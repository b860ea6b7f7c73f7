"""Pre-training of the embedded model in two stages, for vision and language."""
