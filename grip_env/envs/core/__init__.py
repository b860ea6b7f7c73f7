"""What all environments share, in the order of an episode: sampling, instances, features, rules, rendering, vectors."""
