"""The option ``--start-from`` of the verbs that read the config of a run."""

import argparse

START_FROM = (
    "begin at step 0 with the weights of a checkpoint of any format: a folder in Hugging Face's or "
    "Meta's format, a converted one, DeepSpeed's, another run or one of its checkpoints. Settings "
    "of the model, and the tokenizer, are taken from it where the config has none"
)


def add_start_from(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add ``--start-from`` to a verb's arguments."""
    parser.add_argument("--start-from", metavar="PATH", help=START_FROM + more)
