"""An option that takes one value, and refuses a second one that differs.

argparse keeps the last of several values and drops the others without a word, so that
``--prompt A --prompt B`` answered only B.
"""

import argparse
import weakref
from collections.abc import Sequence
from typing import Any

from megatron_chameleon.masking import is_secret_name
from megatron_chameleon.wording import shown


class StoreOnce(argparse.Action):
    """The action of an option without another one.

    The same value may be given again, as scripts do that add options to those of their caller.
    """

    _given: tuple[weakref.ref[argparse.Namespace], Any] | None = None
    """Whose value was set last, and to what: a parser may be used again."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if self.option_strings and self._given is not None:
            place, before = self._given
            if place() is namespace and values != before:
                both = ""
                if not is_secret_name(self.dest):
                    both = f": {shown(before)} and {shown(values)}"
                raise argparse.ArgumentError(self, f"takes one value, and two differ{both}")
        self._given = weakref.ref(namespace), values
        setattr(namespace, self.dest, values)
