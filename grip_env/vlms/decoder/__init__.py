"""The language model by its layers: which models can be run so, the last layer alone, and layer after layer."""
