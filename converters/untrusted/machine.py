"""The stack machine of pickle, on plain data: it imports nothing, and calls only the builders of an allow-list."""

from __future__ import annotations

import codecs
import pickletools
import struct
from collections.abc import Callable
from mmap import mmap
from typing import Any, Final

from converters.untrusted.plain import Allowed, Builder, Refused, key

_MAX_OBJECTS: Final = 1 << 24  # containers, and places in the memo: about a gigabyte
_MAX_INT_BYTES: Final = 64
_MAX_LINE_BYTES: Final = 1 << 20
_MODULES: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's names, which protocols 0 to 2 keep
_NAMES: Final = {"builtins.xrange": "builtins.range", "builtins.unicode": "builtins.str"}

PersistentLoad = Callable[[Any], Any]


class Machine:
    """The stack machine of one pickle. Each method `op_NAME` carries out the opcode of that name in `pickletools`."""

    def __init__(
        self, data: bytes | mmap, position: int, limit: int, allowed: Allowed, persistent: PersistentLoad
    ) -> None:
        self.data = data
        self.position = position
        self.limit = limit
        self.allowed = allowed
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, Any] = {}
        self.made = 0
        self.done = False

    def run(self) -> Any:
        data, table = self.data, _TABLE
        while not self.done:
            operation = table[data[self.position]]
            self.position += 1
            operation(self)
        if len(self.stack) != 1 or self.marked:
            raise Refused("damaged: its last opcode leaves a stack that is not one value")
        return self.stack[0]

    # Reading what follows an opcode.

    def take(self, count: int) -> bytes:
        start, end = self.position, self.position + count
        if end > self.limit:
            raise Refused(f"is truncated: {count} bytes expected at {start} of {self.limit}")
        self.position = end
        return self.data[start:end]

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position, self.position + _MAX_LINE_BYTES)
        if end < 0:
            raise Refused(f"has a line at {self.position} that does not end")
        line = self.data[self.position : end]
        self.position = end + 1
        return line

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def hold(self, container: Any) -> None:
        self.made += 1
        if self.made > _MAX_OBJECTS:
            raise Refused(f"makes more than {_MAX_OBJECTS} containers")
        self.stack.append(container)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]
        if len(self.memo) > _MAX_OBJECTS:
            raise Refused(f"remembers more than {_MAX_OBJECTS} values")

    def refuse(self) -> None:
        code = self.data[self.position - 1]
        name = _OPCODE_NAMES.get(chr(code), f"0x{code:02x}")
        raise Refused(f"uses the opcode {name}, which no checkpoint needs; it was not run")

    # Frames, stack, memo.

    def op_proto(self) -> None:
        if (version := self.number(1)) > 5:
            raise Refused(f"is a pickle of protocol {version} (at most 5)")

    def op_frame(self) -> None:
        self.number(8)

    def op_stop(self) -> None:
        self.done = True

    def op_mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def op_pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def op_pop_mark(self) -> None:
        self.pop_mark()

    def op_dup(self) -> None:
        self.stack.append(self.stack[-1])

    def op_get(self) -> None:
        self.stack.append(self.memo[int(self.line()[:20])])

    def op_binget(self) -> None:
        self.stack.append(self.memo[self.data[self.position]])
        self.position += 1

    def op_long_binget(self) -> None:
        start = self.position
        self.position = start + 4
        self.stack.append(self.memo[int.from_bytes(self.data[start : start + 4], "little")])

    def op_put(self) -> None:
        self.remember(int(self.line()[:20]))

    def op_binput(self) -> None:
        self.memo[self.data[self.position]] = self.stack[-1]
        self.position += 1

    def op_long_binput(self) -> None:
        self.remember(self.number(4))

    def op_memoize(self) -> None:
        memo = self.memo
        if len(memo) >= _MAX_OBJECTS:
            self.remember(len(memo))
        memo[len(memo)] = self.stack[-1]

    # Scalars.

    def op_none(self) -> None:
        self.stack.append(None)

    def op_newtrue(self) -> None:
        self.stack.append(True)

    def op_newfalse(self) -> None:
        self.stack.append(False)

    def op_int(self) -> None:
        line = self.line()
        self.stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else self._decimal(line))

    def op_long(self) -> None:
        self.stack.append(self._decimal(self.line().removesuffix(b"L")))

    def _decimal(self, digits: bytes) -> Any:
        if len(digits) > 2 * _MAX_INT_BYTES:
            raise Refused(f"has an integer of {len(digits)} digits")
        return int(digits)

    def op_binint(self) -> None:
        self.stack.append(int.from_bytes(self.take(4), "little", signed=True))

    def op_binint1(self) -> None:
        self.stack.append(self.data[self.position])
        self.position += 1

    def op_binint2(self) -> None:
        self.stack.append(self.number(2))

    def op_long1(self) -> None:
        self._long(self.number(1))

    def op_long4(self) -> None:
        self._long(self.number(4))

    def _long(self, count: Any) -> None:
        if count > _MAX_INT_BYTES:
            raise Refused(f"has an integer of {count} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def op_float(self) -> None:
        self.stack.append(float(self.line()))

    def op_binfloat(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    # Text and bytes.

    def op_string(self) -> None:
        line = self.line()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise Refused("has a text without quotes around it")
        self.stack.append(codecs.escape_decode(line[1:-1])[0].decode())

    def op_binstring(self) -> None:
        self.stack.append(self.take(self.number(4)).decode())

    def op_short_binstring(self) -> None:
        self.stack.append(self.take(self.number(1)).decode())

    def op_unicode(self) -> None:
        self.stack.append(self.line().decode("raw-unicode-escape").encode().decode())

    def op_short_binunicode(self) -> None:
        self.stack.append(self.take(self.number(1)).decode())

    def op_binunicode(self) -> None:
        self.stack.append(self.take(self.number(4)).decode())

    def op_binunicode8(self) -> None:
        self.stack.append(self.take(self.number(8)).decode())

    def op_short_binbytes(self) -> None:
        self.stack.append(self.take(self.number(1)))

    def op_binbytes(self) -> None:
        self.stack.append(self.take(self.number(4)))

    def op_binbytes8(self) -> None:
        self.stack.append(self.take(self.number(8)))

    op_bytearray8 = op_binbytes8

    # Containers.

    def op_empty_tuple(self) -> None:
        self.stack.append(())

    def op_empty_list(self) -> None:
        self.hold([])

    def op_empty_dict(self) -> None:
        self.hold({})

    def op_empty_set(self) -> None:
        self.hold(set())

    def op_tuple(self) -> None:
        items = self.pop_mark()
        self.hold(tuple(items))

    def op_tuple1(self) -> None:
        self.stack[-1] = (self.stack[-1],)
        self.made += 1

    def op_tuple2(self) -> None:
        last = self.stack.pop()
        self.stack[-1] = (self.stack[-1], last)

    def op_tuple3(self) -> None:
        last, middle = self.stack.pop(), self.stack.pop()
        self.stack[-1] = (self.stack[-1], middle, last)

    def op_list(self) -> None:
        self.hold(self.pop_mark())

    def op_dict(self) -> None:
        items = self.pop_mark()
        self.hold(_paired(items, {}))

    def op_frozenset(self) -> None:
        items = self.pop_mark()
        self.hold({key(item) for item in items})

    def op_append(self) -> None:
        item = self.stack.pop()
        self._top(list).append(item)

    def op_appends(self) -> None:
        items = self.pop_mark()
        self._top(list).extend(items)

    def op_setitem(self) -> None:
        value, name = self.stack.pop(), self.stack.pop()
        self._top(dict)[key(name)] = value

    def op_setitems(self) -> None:
        items = self.pop_mark()
        _paired(items, self._top(dict))

    def op_additems(self) -> None:
        items = self.pop_mark()
        self._top(set).update([key(item) for item in items])

    def _top(self, kind: type) -> Any:
        target = self.stack[-1]
        if type(target) is not kind:
            raise Refused(f"puts items into a {type(target).__name__}, not a {kind.__name__}")
        return target

    # Globals and what is made of them.

    def op_global(self) -> None:
        module, name = self.line().decode(), self.line().decode()
        self._find(module, name)

    def op_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(module) is not str or type(name) is not str:
            raise Refused("names a global by something that is no text")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        full = f"{_MODULES.get(module, module)}.{name}"
        if full not in self.globals:
            if len(full) > 300:
                raise Refused(f"names a global by {len(full)} characters")
            self.globals[full] = self.allowed.find(_NAMES.get(full, full))
        self.stack.append(self.globals[full])

    def op_reduce(self) -> None:
        arguments = self.stack.pop()
        self._call(self.stack.pop(), arguments)

    op_newobj = op_reduce

    def op_newobj_ex(self) -> None:
        named, arguments = self.stack.pop(), self.stack.pop()
        self._call(self.stack.pop(), arguments, named)

    def op_obj(self) -> None:
        owner, *arguments = self.pop_mark()
        self._call(owner, tuple(arguments))

    def op_inst(self) -> None:
        self.op_global()
        owner = self.stack.pop()
        arguments = self.pop_mark()
        self._call(owner, tuple(arguments))

    def _call(self, owner: Any, arguments: Any, named: Any = None) -> None:
        if type(owner) is not Builder:
            raise Refused(f"calls a {type(owner).__name__}, which is no class or function of the list; it was not run")
        if type(arguments) is not tuple or type(named) not in (dict, type(None)):
            raise Refused(f"calls {owner.name} with arguments that are no tuple")
        self.hold(owner.build(*arguments, **(named or {})))

    def op_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is dict:  # attributes hung on an OrderedDict (a module's _metadata) are no data
            return
        if not hasattr(target, "set_state"):
            raise Refused(f"sets the state of a {type(target).__name__}, which has none; it was not run")
        target.set_state(state)

    def op_binpersid(self) -> None:
        self.stack.append(self.persistent(self.stack.pop()))


def _paired(items: list[Any], into: dict[Any, Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise Refused("has a dictionary with a key that has no value")
    for name, value in zip(items[::2], items[1::2], strict=True):
        into[name if type(name) is str else key(name)] = value
    return into


_OPCODE_NAMES: Final = {opcode.code: opcode.name for opcode in pickletools.opcodes}


def _table() -> list[Callable[[Machine], None]]:
    """What carries out each byte; EXT1, EXT2, EXT4, PERSID, the two for buffers and unknown bytes are refused."""
    table: list[Callable[[Machine], None]] = [Machine.refuse] * 256
    for opcode in pickletools.opcodes:
        table[ord(opcode.code)] = vars(Machine).get(f"op_{opcode.name.lower()}", Machine.refuse)
    return table


_TABLE: Final = _table()
