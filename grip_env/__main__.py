"""List the commands: ``python -m grip_env``."""

from __future__ import annotations

COMMANDS = {
    "train": "train an agent and compare it with the baselines",
    "evaluate": "compare trained agents and other methods",
    "answer": "ask one question about one image, with few visual tokens and with all",
    "probe": "mislead a trained agent to test whether it looks for evidence",
    "landscape": "measure how hard selection is on small instances, by scoring every one",
    "benchmark": "train with several seeds and check the claims of the README",
    "benchmark speed": "measure the time of the environments against that of the model",
    "benchmark latency": "measure time, memory and FLOPs of pruning at LLaVA-1.5's shapes",
    "pretrain_vlm": "train an embedded vision-language model",
}
"""Purpose of each command, in the usual order of use."""


def main() -> None:
    """Print the commands."""
    print("The commands of grip_env; each takes --help and --version:\n")
    for name, said in COMMANDS.items():
        print(f"  python -m grip_env.{name:<18} {said}")


if __name__ == "__main__":
    main()
