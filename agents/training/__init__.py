"""Training a scorer other than by rewards alone: imitation and its teachers, relaxations, options of GRPO."""
