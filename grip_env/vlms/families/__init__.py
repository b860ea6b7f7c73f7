"""Model families: what stands for an image in the prompt, and where its tokens are in it.

``base`` says what a family is, ``known`` has those that are supported, ``tower`` looks into their vision towers.
"""
