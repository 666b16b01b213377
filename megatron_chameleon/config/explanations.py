"""What each key of the config means, as its docstring in ``schema.py`` says.

>>> explanations(ModelConfig)["norm_order"]
'pre: ``x + f(norm(x))`` (7B); swin: ``x + norm(f(x))`` (34B).'
"""

import ast
import inspect
import textwrap
from typing import Any


def explanations(section: type[Any]) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line; a field without one is absent."""
    (cls,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(cls, ast.ClassDef)
    found = {}
    for field, after in zip(cls.body, cls.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(after.value.value).split())
    return found
