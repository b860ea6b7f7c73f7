"""Model families with their image placeholders and the positions of visual tokens.

``base`` defines a family, ``known`` has the supported families, ``tower`` reads values from their vision towers.
"""
