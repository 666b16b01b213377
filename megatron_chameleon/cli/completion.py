"""``chameleon completion SHELL``: print the script with which a shell completes ``chameleon``."""

import argparse

from megatron_chameleon.cli.logs import show
from megatron_chameleon.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
HOW = """\
Put the line of your shell into the file that it reads when it starts:

  bash, ~/.bashrc                     eval "$(chameleon completion bash)"
  zsh,  ~/.zshrc, behind `compinit`   eval "$(chameleon completion zsh)"
  fish, ~/.config/fish/config.fish    chameleon completion fish | source

`chameleon` must be on the PATH there, or be written with its whole path. The script asks the
command itself for the words, so it stays right after an update.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = HOW
    parser.add_argument("shell", choices=SHELLS, help="the shell that will read the script")


def run(args: argparse.Namespace) -> None:
    """Print the script.

    Raises:
        ConfigError: The library that the script asks is not installed.
    """
    try:
        from argcomplete import shellcode
    except ImportError as error:
        what = "the package argcomplete is not installed"
        raise ConfigError("completion", what, "Run: pip install argcomplete") from error
    # bash's own completion of $VARIABLES and ~users stays; `completing.py` knows files better
    options = ["-o", "nospace", "-o", "bashdefault"]
    show(shellcode(["chameleon"], shell=args.shell, complete_arguments=options))
