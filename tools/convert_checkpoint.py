"""Megatron-style entry point of ``chameleon convert``: same arguments, same exit codes."""

import sys

from megatron_chameleon.cli.main import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
