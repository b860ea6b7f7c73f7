"""Generation of answers: supported options of ``generate``, decoding loop, timed answers."""
