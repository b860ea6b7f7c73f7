"""Disk caches of encoded images and of the scores of all selections."""
