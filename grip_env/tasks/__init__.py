"""Sources of examples: images with questions and answers."""
