"""Reads a pickle as data: nothing is imported, called or built.

A call in the pickle becomes a `Call` in the result, which the caller interprets or refuses. Containers become plain lists,
tuples and dicts (a set becomes a list, an OrderedDict a dict). One opcode makes one value, so the limit on opcodes bounds
memory and time. The caller must bound values that are shared by reference.
"""
from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field

from .faults import FileFault

LARGEST_PICKLE = 2 ** 22
MOST_OPCODES = 200_000
MOST_NUMBER_KEYS = 4096
"""Limit on numeric dict keys. They can be chosen to collide, which makes a dict quadratic; keys of text cannot."""
_MOST_BITS = 256
_ORDERED_DICT = "collections.OrderedDict"
_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2 names, used by old protocols
_MARK = object()


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle refers to; text: "module.name"."""

    text: str


@dataclass(eq=False)
class Call:
    """A call in a pickle: the callable's name, its arguments, and the state given to the result."""

    name: str
    arguments: tuple
    state: object = None


@dataclass(eq=False)
class Reference:
    """A persistent id: an object stored outside of the pickle."""

    identity: object


@dataclass
class Pickle:
    """A pickle as data, with all names and references in it."""

    value: object = None
    names: dict[str, None] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)


def read_pickle(stream: io.BytesIO) -> Pickle:
    """Reads one pickle from the stream's position. Raises FileFault for a damaged or oversized pickle."""
    machine = _Machine()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number >= MOST_OPCODES:
                raise FileFault(f"the file holds more than {MOST_OPCODES} values")
            machine.step(opcode.name, argument)
    except FileFault:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, EOFError) as error:
        raise FileFault("the file is cut off or damaged") from error
    return machine.result


class _Machine:
    """The pickle machine: a stack of values, and a memo of values by number."""

    def __init__(self) -> None:
        self.result = Pickle()
        self.stack: list = []
        self.memo: dict[int, object] = {}
        self.number_keys = 0

    def step(self, opcode: str, argument: object) -> None:
        if opcode in _VALUES:
            if isinstance(argument, int) and argument.bit_length() > _MOST_BITS:
                raise FileFault(f"the file holds a number of more than {_MOST_BITS} bits")
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _STEPS:
            _STEPS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME"):
            raise FileFault(f"the file holds something that is no data (the opcode {opcode})")

    def pop(self, kind: type = object):
        value = self.stack.pop()
        if value is _MARK or not isinstance(value, kind):
            raise FileFault("the file is damaged")
        return value

    def top(self, kind: type | tuple):
        if not isinstance(self.stack[-1], kind):
            raise FileFault("the file is damaged")
        return self.stack[-1]

    def marked(self) -> list:
        """Pops the last mark and returns all values above it."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:  # IndexError on an empty stack
            place -= 1
            if place < 0:
                raise FileFault("the file is damaged")
        values = self.stack[place + 1:]
        del self.stack[place:]
        return values

    def drop(self, _argument: object) -> None:
        self.stack.pop()

    def repeat(self, _argument: object) -> None:
        value = self.pop()
        self.stack += (value, value)

    def stop(self, _argument: object) -> None:
        self.result.value = self.pop()

    def remember(self, number: object) -> None:
        self.memo[len(self.memo) if number is None else int(number)] = self.top(object)

    def recall(self, number: object) -> None:
        self.stack.append(self.memo[int(number)])

    def make_tuple(self, count: int | None) -> None:
        values = self.marked() if count is None else [self.pop() for _ in range(count)][::-1]
        self.stack.append(tuple(values))

    def make_list(self, _argument: object) -> None:
        self.stack.append(self.marked())

    def make_dict(self, _argument: object) -> None:
        values = self.marked()
        self.stack.append({})
        self.put(values)

    def append(self, values: list) -> None:
        self.top(list).extend(values)

    def put(self, values: list) -> None:
        target = self.top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            if isinstance(key, (int, float)):
                self.number_keys += 1
                if self.number_keys > MOST_NUMBER_KEYS:
                    raise FileFault(f"the file holds more than {MOST_NUMBER_KEYS} entries with a number for a name")
            elif not (key is None or isinstance(key, (str, bytes, Call, Name))):
                raise FileFault("the file holds an entry whose name is neither a text nor a number")
            target[key] = value

    def name(self, words: object) -> None:
        if words is None:
            name, module = self.pop(str), self.pop(str)
        else:
            module, _, name = str(words).partition(" ")
        text = f"{_MODULES.get(module, module)}.{name}"
        self.result.names[text] = None
        self.stack.append(Name(text))

    def call(self, _argument: object) -> None:
        arguments, called = self.pop(tuple), self.pop()
        self._call(called, arguments)

    def call_with_names(self, _argument: object) -> None:
        named, arguments = self.pop(dict), self.pop(tuple)
        self._call(self.pop(), (*arguments, named))

    def call_marked(self, words: object) -> None:
        arguments = self.marked()
        if words is None:
            called, *arguments = arguments
        else:
            self.name(words)
            called = self.pop()
        self._call(called, tuple(arguments))

    def _call(self, called: object, arguments: tuple) -> None:
        name = called.text if isinstance(called, Name) else "the result of a call"
        if not isinstance(called, Name):
            self.result.names[name] = None
        self.stack.append({} if name == _ORDERED_DICT and not arguments else Call(name, arguments))

    def give_state(self, _argument: object) -> None:
        state, target = self.pop(), self.top((Call, dict))
        if isinstance(target, Call):  # attributes of a dict (a state_dict's versions) are dropped
            target.state = state

    def refer(self, _argument: object) -> None:
        self.result.references.append(Reference(self.pop()))
        self.stack.append(self.result.references[-1])


_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
           "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
           "BINBYTES8"}
_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list,
    "EMPTY_DICT": dict, "EMPTY_SET": list, "MARK": lambda: _MARK}
_STEPS: dict[str, Callable[[_Machine, object], None]] = {
    "POP": _Machine.drop, "POP_MARK": lambda machine, _: machine.marked(), "DUP": _Machine.repeat, "STOP": _Machine.stop,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    "TUPLE": _Machine.make_tuple,
    **{f"TUPLE{count}": lambda machine, _, count=count: machine.make_tuple(count) for count in (1, 2, 3)},
    "LIST": _Machine.make_list, "FROZENSET": _Machine.make_list, "DICT": _Machine.make_dict,
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, _: machine.append(machine.marked())),
    "SETITEM": lambda machine, _: machine.put([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.put(machine.marked()),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), _Machine.name),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "NEWOBJ_EX": _Machine.call_with_names, **dict.fromkeys(("INST", "OBJ"), _Machine.call_marked),
    "BUILD": _Machine.give_state, **dict.fromkeys(("BINPERSID", "PERSID"), _Machine.refer)}
