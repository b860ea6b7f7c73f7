"""Training of scorers: options of all algorithms, imitation and its teachers, relaxations."""
