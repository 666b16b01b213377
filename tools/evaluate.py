"""Megatron-style entry point of ``chameleon evaluate``: same arguments, same exit codes."""

import sys

from megatron_chameleon.cli.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
