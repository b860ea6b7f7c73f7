"""Caches on disk: encoded images (``images``, ``image_entries``), and scores of all selections (``tables``)."""
