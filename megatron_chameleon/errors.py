"""Errors that a user can cause, each with where it is, what is wrong and what to do about it.

The command line prints them as one line, ``error: WHERE: WHAT. REMEDY.``, and ends with exit code
2. Anything else that is raised is a bug of ours: it ends with exit code 1 and a traceback.
"""

from collections.abc import Sequence


class ChameleonError(Exception):
    """A user's mistake.

    Args:
        where: The file, line, key or option that is at fault.
        what: What is wrong, with the numbers, without a full stop.
        remedy: What to do, an imperative sentence without a full stop.
    """

    def __init__(self, where: str, what: str, remedy: str) -> None:
        super().__init__(where, what, remedy)
        self.where = where
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.remedy}."

    def lines(self) -> list[str]:
        """One line for each problem, as the command line prints them after ``error: ``."""
        return [str(self)]


class ConfigError(ChameleonError):
    """A config file, an override or a combination of values that cannot work."""


class DataError(ChameleonError):
    """An input file, document, image, tokenizer or .bin/.idx that cannot be used."""


class CheckpointError(ChameleonError):
    """A checkpoint that cannot be written, read or converted."""


class TrainingError(ChameleonError):
    """A run that cannot go on, such as one whose loss is no longer finite."""


class ConfigErrors(ConfigError):
    """Several problems of one config, reported together.

    Args:
        problems: The single errors, in the order of the config; at least one.
    """

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        super().__init__(problems[0].where, problems[0].what, problems[0].remedy)
        self.problems = list(problems)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        return [str(problem) for problem in self.problems]


def first_line(error: BaseException) -> str:
    """What an error of a library says, in a line that is not empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
