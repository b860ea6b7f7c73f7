"""What every room uses, and nothing of the subject: files that appear whole, signals, and numbers that are finite."""
