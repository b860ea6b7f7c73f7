"""Language models run by their layers: the last layer alone, or layer by layer."""
