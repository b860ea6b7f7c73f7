"""The folder of one run: how it was configured, how far it has come, and what TensorBoard shows of it."""
