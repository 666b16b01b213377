"""Words of the command line that replace values of a config: ``section.key=value``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from megatron_chameleon.config.reading.yaml_file import ERRORS, check_yaml
from megatron_chameleon.errors import ConfigError, first_line
from megatron_chameleon.wording import cut

LONGEST = 64 * 1024
"""Characters of a word; a list of a few hundred data sources fits."""
# Names, and entries of lists: data.stage1[0].weight.
_KEY = re.compile(r"[\w-]+(\[\d{1,6}\])*(\.[\w-]+(\[\d{1,6}\])*)*")


@dataclass(frozen=True)
class Override:
    """One word."""

    key: str
    """Such as ``data.stage1[0].weight``."""
    value: str
    """In YAML."""

    def concerns(self, key: str) -> bool:
        """Whether the word sets a key, or something that stands above or below it."""
        own, other = (f"{k.replace('[', '.[')}." for k in (self.key, key))
        return own.startswith(other) or other.startswith(own)

    def __str__(self) -> str:
        return cut(f"{self.key}={self.value}")


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Split words into keys and values.

    Raises:
        ConfigError: A word has another form, or its value is not YAML.
    """
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not _KEY.fullmatch(key):
            what = "not of the form section.key=value"
            raise ConfigError(cut(word) or "''", what, "Write, for example, training.steps=100")
        if len(word) > LONGEST:
            what = f"has {len(word):,} characters, more than {LONGEST:,}"
            raise ConfigError(cut(word), what, "Write the value into the config file")
        override = Override(key, value)
        try:
            check_yaml(value, str(override))
        except ConfigError as error:
            raise ConfigError(str(override), error.what, "Correct or quote the value") from error
        found.append(override)
    return found


def apply_overrides(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Change a config by words, in their order.

    Raises:
        ConfigError: A word does not fit the config: it names an entry that a list does not have, or
            a key below a value that has none.
    """
    for override in overrides:
        try:
            config.merge_with_dotlist([f"{override.key}={override.value}"])
        except (AssertionError, IndexError, KeyError, AttributeError) as error:
            what = f"there is no such entry ({first_line(error)[:200]})"
            remedy = "Name one that the config has; the entries of a list are counted from 0"
            raise ConfigError(str(override), what, remedy) from error
        except ERRORS as error:
            what = f"cannot be read ({first_line(error)[:200]})"
            if "container types" in what:  # OmegaConf's words for a list in place of a mapping
                is_list = OmegaConf.is_list(OmegaConf.select(config, override.key))
                what = f"{override.key} must be {'a list' if is_list else 'a mapping'}"
                remedy = "Write it as [...], or change one entry as "
                remedy += f"{override.key}[0]=..." if is_list else f"{override.key}.key=..."
                raise ConfigError(str(override), what, remedy) from error
            raise ConfigError(str(override), what, "Correct or quote the value") from error
