"""The folder of a run, with its configuration, its status, and its logs for TensorBoard."""
