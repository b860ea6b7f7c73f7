"""Visual-token selection as a Markov decision process: environments, rewards and pictures.

Import from the modules (``grip_env.envs.selection`` and so on) or the public names from ``grip_env``.
"""
