"""Unpickle what someone else may have written: from a fixed list of names, and within bounds.

Checkpoints of torch contain pickles, which can call any function and, in a hundred bytes, ask for
hours of work or for all of the memory. The unpickler of this file

- knows the opcodes that Python's and torch's picklers emit, and no others;
- resolves names through a function of its caller, and calls nothing else;
- limits the memory of what it builds, and checks lengths against what is left of the pickle;
- looks at every dictionary key and every argument before it is hashed, because the hash of a tuple
  that contains another one twice, sixty levels deep, would not end in a lifetime.

Source of the opcodes: Python's ``pickletools``.
"""

import dataclasses
import struct
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

LARGEST_BYTES = 128 << 20
"""Most memory for the objects of a pickle, by an estimate. The names, shapes and places of 10,000
tensors take 20 MiB."""
LARGEST_KEY = 1000
"""Values within a key or an argument, each counted as often as it occurs."""
_SMALLEST_BYTES = 40
_OBJECT_BYTES = {
    b"]": 72,
    b"}": 80,
    b"\x8f": 224,
    b"\x91": 224,
    b"(": 16,
    b"R": 200,
    b"\x81": 200,
    b"b": 200,
    b"q": 110,
    b"r": 110,
    b"\x94": 110,
    b"s": 100,
    b"\x85": 56,
    b"\x86": 64,
    b"\x87": 72,
    b"t": 80,
}
"""Memory of what an opcode makes, where it is more than the smallest. Texts are as long as in the
pickle."""

Resolve = Callable[[str, str], Any]
"""Turns a module and a name into what stands for it, or raises ``UnpicklingError``."""


class Mark:
    """Stands on the stack where a variable number of values begins."""


_MARK = Mark()
_FIXED = {
    b"N": None,
    b"\x88": True,
    b"\x89": False,
}
_INTEGERS = {b"K": "<B", b"M": "<H", b"J": "<i"}
_TEXTS = {b"\x8c": "<B", b"X": "<I", b"\x8d": "<Q"}
_BYTES = {b"C": "<B", b"B": "<I", b"\x8e": "<Q"}
_STRINGS = {b"U": "<B", b"T": "<i"}
_TUPLES = {b")": 0, b"\x85": 1, b"\x86": 2, b"\x87": 3}


def is_small(value: Any) -> bool:
    """Whether a value can be hashed, compared and printed in a moment."""
    pending, seen = [value], 0
    while pending:
        seen += 1
        if seen > LARGEST_KEY:
            return False
        value = pending.pop()
        if isinstance(value, tuple | list | set | frozenset):
            if len(value) > LARGEST_KEY:
                return False
            pending.extend(value)
        elif isinstance(value, dict):
            if len(value) > LARGEST_KEY:
                return False
            pending.extend(value.keys())
            pending.extend(value.values())
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            pending.extend(vars(value).values())
    return True


class BoundedUnpickler:
    """Reads one pickle.

    Args:
        content: The pickle.
        resolve: Turns the names in it into what stands for them: functions and classes that are
            safe to call with any arguments, or values.
        resolve_persistent: Turns a persistent id into an object; None refuses such ids.
        largest_bytes: Most memory for the objects, by an estimate.
    """

    def __init__(
        self,
        content: bytes,
        resolve: Resolve,
        resolve_persistent: Callable[[Any], Any] | None = None,
        largest_bytes: int = LARGEST_BYTES,
    ) -> None:
        self._content = content
        self._at = 0
        self._resolve = resolve
        self._resolve_persistent = resolve_persistent
        self._largest_bytes = largest_bytes
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The object.

        Raises:
            UnpicklingError: The pickle is cut off, malformed, too large, or asks for something that
                is not allowed.
        """
        try:
            return self._run()
        except (RecursionError, OverflowError, MemoryError) as error:
            raise UnpicklingError(f"it is too large ({type(error).__name__})") from error
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            what = f"{type(error).__name__} before byte {self._at:,}"
            raise UnpicklingError(f"it is damaged: {what}") from error

    def _run(self) -> Any:
        spent_bytes = 0
        while spent_bytes < self._largest_bytes:
            opcode = self._take(1)
            if opcode == b".":
                return self._stack.pop()
            step = _STEPS.get(opcode)
            if step is None:
                raise UnpicklingError(f"it has the opcode {opcode!r}")
            spent_bytes += _OBJECT_BYTES.get(opcode, _SMALLEST_BYTES)
            step(self, opcode)
        raise UnpicklingError(f"it would take more than {self._largest_bytes >> 20} MiB")

    def _take(self, count: int) -> bytes:
        found = self._content[self._at : self._at + count]
        if len(found) != count:
            raise UnpicklingError(f"it ends after {len(self._content):,} bytes")
        self._at += count
        return found

    def _number(self, form: str) -> int:
        number: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return number

    def _line(self) -> str:
        end = self._content.index(b"\n", self._at, self._at + 300)
        line = self._content[self._at : end].decode("utf-8")
        self._at = end + 1
        return line

    def _pop_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise UnpicklingError("it is damaged (a mark is missing)")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def _fixed(self, opcode: bytes) -> None:
        self._stack.append(_FIXED[opcode])

    def _integer(self, opcode: bytes) -> None:
        self._stack.append(self._number(_INTEGERS[opcode]))

    def _long(self, opcode: bytes) -> None:
        found = self._take(self._number("<B"))
        self._stack.append(int.from_bytes(found, "little", signed=True))

    def _float(self, opcode: bytes) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _text(self, opcode: bytes) -> None:
        found = self._take(self._number(_TEXTS[opcode]))
        self._stack.append(found.decode("utf-8", "surrogatepass"))

    def _bytes(self, opcode: bytes) -> None:
        self._stack.append(self._take(self._number(_BYTES[opcode])))

    def _string(self, opcode: bytes) -> None:
        size = self._number(_STRINGS[opcode])
        if size < 0:
            raise UnpicklingError("it has a string of negative length")
        self._stack.append(self._take(size).decode("utf-8"))

    def _tuple(self, opcode: bytes) -> None:
        count = _TUPLES[opcode]
        if len(self._stack) < count:
            raise IndexError
        at = len(self._stack) - count
        self._stack[at:] = [tuple(self._stack[at:])]

    def _tuple_from_mark(self, opcode: bytes) -> None:
        self._stack.append(tuple(self._pop_mark()))

    def _empty_list(self, opcode: bytes) -> None:
        self._stack.append([])

    def _empty_dict(self, opcode: bytes) -> None:
        self._stack.append({})

    def _empty_set(self, opcode: bytes) -> None:
        self._stack.append(set())

    def _append(self, opcode: bytes) -> None:
        values = self._pop_mark() if opcode == b"e" else [self._stack.pop()]
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target.extend(values)

    def _set_items(self, opcode: bytes) -> None:
        if opcode == b"u":
            values = self._pop_mark()
        else:
            value, key = self._stack.pop(), self._stack.pop()
            values = [key, value]
        target = self._stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise TypeError
        for key, value in zip(values[::2], values[1::2], strict=True):
            self._check_small(key)
            target[key] = value

    def _add_items(self, opcode: bytes) -> None:
        values = self._pop_mark()
        target = self._stack[-1]
        if not isinstance(target, set):
            raise TypeError
        for value in values:
            self._check_small(value)
            target.add(value)

    def _frozen_set(self, opcode: bytes) -> None:
        values = self._pop_mark()
        for value in values:
            self._check_small(value)
        self._stack.append(frozenset(values))

    def _mark(self, opcode: bytes) -> None:
        self._stack.append(_MARK)

    def _global(self, opcode: bytes) -> None:
        if opcode == b"c":
            module, name = self._line(), self._line()
        else:
            name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        self._stack.append(self._resolve(module, name))

    def _call(self, opcode: bytes) -> None:
        """REDUCE or NEWOBJ: call something that ``resolve`` returned."""
        arguments, called = self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, tuple) or not callable(called):
            raise TypeError
        self._check_small(arguments)
        if opcode == b"\x81" and isinstance(called, type):
            if arguments:
                raise TypeError
            self._stack.append(object.__new__(called))
        else:
            self._stack.append(called(*arguments))

    def _build(self, opcode: bytes) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, type) or not hasattr(target, "__dict__"):
            if isinstance(target, dict):  # an OrderedDict's attributes, such as _metadata
                return
            raise TypeError
        if hasattr(target, "__setstate__"):
            self._check_small(state)
            target.__setstate__(state)
        elif isinstance(state, dict) and all(isinstance(name, str) for name in state):
            vars(target).update(state)
        else:
            raise TypeError

    def _get(self, opcode: bytes) -> None:
        self._stack.append(self._memo[self._number("<B" if opcode == b"h" else "<I")])

    def _put(self, opcode: bytes) -> None:
        if opcode == b"\x94":
            number = len(self._memo)
        else:
            number = self._number("<B" if opcode == b"q" else "<I")
        if self._stack[-1] is _MARK:
            raise TypeError
        self._memo[number] = self._stack[-1]

    def _persistent(self, opcode: bytes) -> None:
        if self._resolve_persistent is None:
            raise UnpicklingError("it has persistent ids")
        found = self._stack.pop()
        self._check_small(found)
        self._stack.append(self._resolve_persistent(found))

    def _skip(self, opcode: bytes) -> None:
        self._take(1 if opcode == b"\x80" else 8)

    def _check_small(self, value: Any) -> None:
        if type(value) is not str and not is_small(value):
            raise UnpicklingError(f"it has a key or an argument of more than {LARGEST_KEY} values")


_STEPS: dict[bytes, Callable[[BoundedUnpickler, bytes], None]] = {
    **dict.fromkeys(_FIXED, BoundedUnpickler._fixed),
    **dict.fromkeys(_INTEGERS, BoundedUnpickler._integer),
    **dict.fromkeys(_TEXTS, BoundedUnpickler._text),
    **dict.fromkeys(_BYTES, BoundedUnpickler._bytes),
    **dict.fromkeys(_STRINGS, BoundedUnpickler._string),
    **dict.fromkeys(_TUPLES, BoundedUnpickler._tuple),
    b"\x8a": BoundedUnpickler._long,
    b"G": BoundedUnpickler._float,
    b"t": BoundedUnpickler._tuple_from_mark,
    b"]": BoundedUnpickler._empty_list,
    b"}": BoundedUnpickler._empty_dict,
    b"\x8f": BoundedUnpickler._empty_set,
    **dict.fromkeys((b"a", b"e"), BoundedUnpickler._append),
    **dict.fromkeys((b"s", b"u"), BoundedUnpickler._set_items),
    b"\x90": BoundedUnpickler._add_items,
    b"\x91": BoundedUnpickler._frozen_set,
    b"(": BoundedUnpickler._mark,
    **dict.fromkeys((b"c", b"\x93"), BoundedUnpickler._global),
    **dict.fromkeys((b"R", b"\x81"), BoundedUnpickler._call),
    b"b": BoundedUnpickler._build,
    **dict.fromkeys((b"h", b"j"), BoundedUnpickler._get),
    **dict.fromkeys((b"q", b"r", b"\x94"), BoundedUnpickler._put),
    b"Q": BoundedUnpickler._persistent,
    **dict.fromkeys((b"\x80", b"\x95"), BoundedUnpickler._skip),
}
