"""Visual-token selection as a Markov decision process: environments, rewards and pictures.

Import the public names from ``grip_env``, or any name from its module (such as ``grip_env.envs.selection``).
"""
