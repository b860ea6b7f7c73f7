"""General utilities: atomic files, signals, command output, and checks for finite numbers."""
