"""Errors that a user can cause: where the problem is, what is wrong, and what to do about it.

The command line prints each as one line, ``error: WHERE: WHAT. REMEDY.``, and exits with code 2.
A fault of the machine that nobody expected gets such a line too (``cli/outside_faults.py``). Any
other exception is a bug of ours: it exits with code 1 and asks for a report (``cli/bugs.py``).
"""

import errno
from collections.abc import Sequence

REMEDIES = {
    errno.ENOSPC: "Make room on the disk and run the same command again",
    errno.EDQUOT: "Make room in your quota and run the same command again",
    errno.EROFS: "Choose another folder: this file system is read-only",
    errno.EACCES: "Choose another folder, or change its permissions",
    errno.EPERM: "Choose another folder, or change its permissions",
    errno.ENOTDIR: "Choose another folder: a part of this path is a file",
    errno.EISDIR: "Give the name of a file: this is a folder",
    errno.ENOENT: "Create the folder that it lies in",
    errno.EEXIST: "Choose another name: a file already has this one",
    errno.ELOOP: "Remove the link and run the same command again",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f), or choose another disk",
    errno.EIO: "Check the disk",
}
"""What to do about an error of the file system, by its number."""


class ChameleonError(Exception):
    """A user's mistake.

    >>> str(ConfigError("model.num_layers", "30 layers do not fit 4 stages", "Use 28 or 32"))
    'model.num_layers: 30 layers do not fit 4 stages. Use 28 or 32.'
    >>> str(ConfigError("model.num_layer", "Unknown key", "Did you mean `model.num_layers`?"))
    'model.num_layer: Unknown key. Did you mean `model.num_layers`?'

    Args:
        where: The file, line, key or option that is at fault.
        what: What is wrong, with the numbers. The full stop is added.
        remedy: What to do, as an imperative sentence. The full stop is added, unless the text ends
            with a mark of its own ("?", "!" or ".").
    """

    exit_code = 2
    """Of a command that ends with this error. The SLURM scripts restart no job that ends with 2."""

    def __init__(self, where: str, what: str, remedy: str) -> None:
        super().__init__(where, what, remedy)
        self.where = where
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.where}: {_sentence(self.what)} {_sentence(self.remedy)}"

    def lines(self) -> list[str]:
        """One line per problem, as the command line prints them after ``error: ``."""
        return [str(self)]


class ConfigError(ChameleonError):
    """A config file, an override or a combination of values that cannot work."""


class DataError(ChameleonError):
    """An input file, document, image, tokenizer or .bin/.idx file that cannot be used."""


class CheckpointError(ChameleonError):
    """A checkpoint that cannot be written, read or converted."""


class TrainingError(ChameleonError):
    """A run that cannot continue, for example because its loss is no longer finite."""


class PeerError(ChameleonError):
    """Another process of the job is gone. The same command may succeed, so a job is restarted."""

    exit_code = 1


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
    """The first line of a library's error message, or the error's type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """The whole message of an exception on a single line."""
    return " ".join(str(error).split()) or type(error).__name__


def what_and_option(error: ChameleonError) -> str:
    """What is wrong, and the remedy if it names an option of the command.

    >>> what_and_option(DataError("a.png", "130 MiB, the limit is 128", "Raise --max-image-mib"))
    '130 MiB, the limit is 128. Raise --max-image-mib'
    >>> what_and_option(DataError("a.jsonl:1", "the line is not valid JSON", "Fix the line"))
    'the line is not valid JSON'
    """
    return f"{error.what}. {error.remedy}" if "--" in error.remedy else error.what


def _sentence(text: str) -> str:
    return text if text.endswith(("?", "!", ".")) else f"{text}."
