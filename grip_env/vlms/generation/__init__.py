"""Answers word by word: which options of ``generate`` are served, the decoding loop, and one answer with its times."""
