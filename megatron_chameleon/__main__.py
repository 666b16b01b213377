"""``python -m megatron_chameleon VERB``: the same as ``chameleon VERB``, for torchrun."""

from megatron_chameleon.cli.main import main

if __name__ == "__main__":
    main()
