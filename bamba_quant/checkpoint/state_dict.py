"""The pickle in a ``pytorch_model*.bin``, interpreted as what torch writes for a dictionary of tensors.

Nothing in it is imported or called: every name that it refers to must be one of those below. Time and memory
are bounded by the number of its opcodes.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any, NoReturn

from bamba_quant.checkpoint.base import are_counts, is_shape
from bamba_quant.errors import repr_short

# torch's storage classes of types that weights can be read from, and their formats.
STORAGES = {"FloatStorage": "f32", "HalfStorage": "f16", "BFloat16Storage": "bf16"}
_MOST_OPCODES = 2_000_000  # a tensor takes about 55


class PickleError(ValueError):
    """A pickle that is not a dictionary of tensors."""


@dataclass(frozen=True)
class PickledStorage:
    """A record of the archive, ``key``, with ``elements`` numbers; ``kind`` is torch's class."""

    kind: str
    key: str
    elements: int


@dataclass(frozen=True)
class PickledTensor:
    """A strided view of a storage, in elements. ``plain`` is false for values that are stored negated or conjugated."""

    storage: PickledStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    plain: bool

    @property
    def contiguous(self) -> bool:
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if length != 1 and stride != expected:
                return 0 in self.shape
            expected *= length
        return True


@dataclass(frozen=True)
class _Global:
    """A name in a module that the pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def read_state_dict(data: bytes) -> Any:
    """What ``data`` holds: dictionaries with text as keys, lists, tuples, plain values and ``PickledTensor``.

    Raises ``PickleError`` for anything that torch does not write for these.
    """
    machine = _PickleMachine()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if count > _MOST_OPCODES:
            raise PickleError(f"more than {_MOST_OPCODES:,} opcodes")
        if opcode.name == "STOP":
            return machine.stack[-1]
        machine.step(opcode.name, argument)
    raise PickleError("a pickle without an end")


class _PickleMachine:
    """The stack machine of pickle, protocol 2, which torch.save uses."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("BINUNICODE", "SHORT_BINSTRING", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "GLOBAL":
            stack.append(_Global(*argument.split(" ", 1)))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in _TUPLES:
            length = _TUPLES[name]
            if len(stack) < length:
                raise IndexError
            stack[-length:] = [tuple(stack[-length:])]
        elif name == "MARK":
            self._marks.append(stack)
            self.stack = []
        elif name == "TUPLE":
            self._to_mark().append(tuple(stack))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else stack
            target = stack[-1] if name == "APPEND" else self._to_mark()[-1]
            if type(target) is not list:
                raise PickleError(f"items added to {_describe(target)}")
            target += items
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else stack
            _set_items(stack[-1] if name == "SETITEM" else self._to_mark()[-1], items)
        elif name == "REDUCE":
            arguments = stack.pop()
            stack[-1] = _call(stack[-1], arguments)
        elif name == "BUILD":  # a state_dict's versions of modules
            stack.pop()
            if type(stack[-1]) is not dict:
                raise PickleError(f"a state set on {_describe(stack[-1])}")
        elif name == "BINPERSID":
            stack[-1] = _storage(stack[-1])
        elif name != "PROTO":
            raise PickleError(f"the opcode {name}")

    def _to_mark(self) -> list[Any]:
        self.stack = self._marks.pop()
        return self.stack


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _set_items(target: Any, items: list[Any]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise PickleError(f"items added to {_describe(target)}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):
            raise PickleError(f"a key that is not text: {_describe(key)}")
        target[key] = value


def _call(function: Any, arguments: Any) -> Any:
    """The result of one of torch's own functions or classes."""
    if type(function) is not _Global or type(arguments) is not tuple:
        raise PickleError(f"a call of {_describe(function)}")
    name = str(function)
    if name == "collections.OrderedDict" and not arguments:
        return {}
    if name == "torch._utils._rebuild_tensor_v2" and len(arguments) in (6, 7):
        return _tensor(*arguments[:4], *arguments[6:])
    if name.startswith("torch._utils._rebuild_parameter") and arguments:
        return _only_tensor(arguments[0])
    if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4:  # with attributes of its own
        return _only_tensor(_call(arguments[0], arguments[2]))
    raise PickleError(f"a call of {_describe(function)}")


def _only_tensor(value: Any) -> PickledTensor:
    return value if type(value) is PickledTensor else _not_a_tensor(value)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, metadata: Any = None) -> PickledTensor:
    if not (
        type(storage) is PickledStorage
        and type(shape) is type(stride) is tuple
        and len(shape) == len(stride)
        and is_shape(shape)
        and are_counts((offset, *stride))
    ):
        raise PickleError(
            f"a tensor of {_describe(storage)}, offset {repr_short(offset)}, shape {repr_short(shape)}, "
            f"stride {repr_short(stride)}"
        )
    return PickledTensor(storage, offset, shape, stride, not metadata)


def _storage(found: Any) -> PickledStorage:
    match found:
        case ("storage", _Global() as kind, str() as key, str(), elements) if kind.module in (
            "torch",
            "torch.storage",
        ) and are_counts((elements,)):
            return PickledStorage(kind.name, key, elements)
    return _not_a_tensor(found)


def _not_a_tensor(value: Any) -> NoReturn:
    raise PickleError(f"{_describe(value)} where a tensor is expected")


def _describe(value: Any) -> str:
    return repr(str(value)[:200]) if type(value) is _Global else f"a {type(value).__name__}"
