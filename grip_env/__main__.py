"""List the commands: ``python -m grip_env``."""

from __future__ import annotations

COMMANDS = {
    "train": "train an agent, and compare it with the baselines",
    "evaluate": "compare trained agents and other methods",
    "answer": "ask one question about one image, with few visual tokens and with all",
    "probe": "mislead a trained agent: does it look for evidence?",
    "landscape": "how hard the choice is, exactly, on small instances",
    "benchmark": "train with several seeds and check what the project promises",
    "benchmark speed": "what the environments cost beside the model they call",
    "benchmark latency": "time, memory and FLOPs of pruning at LLaVA-1.5's shapes",
    "pretrain_vlm": "train the embedded vision-language model from scratch",
}
"""What each command does, in the order in which one needs them."""


def main() -> None:
    """Print the commands."""
    print("The commands of grip_env; each takes --help and --version:\n")
    for name, said in COMMANDS.items():
        print(f"  python -m grip_env.{name:<18} {said}")


if __name__ == "__main__":
    main()
