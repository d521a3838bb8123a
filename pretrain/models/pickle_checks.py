"""What the pickle in a checkpoint would do, found out without doing it.

torch's safe reader builds tensors and plain values only. This is about what it lets through: a file of a kilobyte
whose values take more memory or time than a machine has. So the instructions are followed with stand-ins for their
values, which know how many values each one stands for (a tuple that holds another one twice stands for both):

    names     it asks for nothing but tensors, plain values, NumPy's numbers (see numpy_numbers) and argparse.Namespace
              (DINO and iBOT write one)
    sizes     no value stands for more than MAX_VALUES: hashing such a tuple takes years
    calls     its functions are given no more than MAX_VALUES altogether: each call copies them
    encodings bytes are written as latin-1 text; in `hex` they double with each call

The instructions are listed with `pickletools`, which runs nothing.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.clipped_file import ClippedFile
from pretrain.errors import DinobenchError
from pretrain.models.numpy_numbers import STAND_INS

TORCH_MODULES = ("torch", "torch._utils", "torch._tensor", "torch.nn.parameter", "torch.serialization", "torch.storage")
"""Names of these modules are left to torch, whose unpickler knows which of them are harmless."""
COPYING = ("torch._utils._rebuild_device_tensor_from_numpy", "torch._utils._rebuild_device_tensor_from_cpu_tensor")
"""But for these, of devices that are no CUDA: they copy a tensor, also one that repeats a number a trillion times."""
ENCODE = "_codecs.encode"
HARMLESS = (
    "collections.OrderedDict",
    "collections.Counter",
    "argparse.Namespace",
    ENCODE,
    "builtins.set",
    "__builtin__.set",
    *(name for _, name in STAND_INS),
)
"""Not `bytearray`, which torch admits: bytearray(n) in a file of a hundred bytes takes n bytes of memory."""
MAX_OPCODES = 1_000_000
"""Pickle instructions; a ViT-g with its optimiser has about 200 000."""
MAX_VALUES = 10 * MAX_OPCODES
LEGACY_PICKLES = 5
"""Before its tensors a file of the time before torch 1.6 holds: magic number, protocol, system, payload, keys."""
_TEXT_BYTES = 64
"""A text counts as one value for so many of its bytes."""


def check_pickle(path: Path) -> None:
    """Refuse a pickle that asks for more than tensors and plain values, or for more of them than a file can mean.

    Raises:
        DinobenchError: names all classes and functions, also when torch would stop at the first.
    """
    try:
        asked = {name for pickled in _pickles_of(path) for name in _Reading(path).names_in(pickled)}
    except DinobenchError:
        raise
    except Exception:  # damaged: torch says what is wrong with it
        return
    allowed = {name for name in asked if name in HARMLESS or name.rpartition(".")[0] in TORCH_MODULES} - {*COPYING}
    if asked - allowed:
        raise unpickling_refused(path, sorted(asked - allowed))


def unpickling_refused(path: Path, names: list[str]) -> DinobenchError:
    """The error for a file that asks for these classes or functions."""
    return DinobenchError(
        f"{path} asks to unpickle {', '.join(names)}; expected tensors, plain values and argparse.Namespace only. It "
        "is refused because unpickling runs code from the file: where it was made, save its state dicts alone in a "
        "new file (torch.save({'teacher': network.state_dict()}, path)) and give that"
    )


def _pickles_of(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """What holds pickles, and how many at most. Of a zip every member that could be the one that torch takes."""
    if not zipfile.is_zipfile(path):
        with ClippedFile(path) as file:
            yield file, LEGACY_PICKLES
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith("data.pkl"):
                yield io.BytesIO(archive.read(member)), 1


@dataclass(eq=False, slots=True)
class _Value:
    """Stands for a value."""

    size: int = 1
    """Values it stands for, itself included, at most MAX_VALUES + 1."""
    text: str | None = None
    """Of a text."""
    name: str | None = None
    """Of a class or function."""
    parts: tuple[_Value, ...] = ()
    """Of a tuple."""


@dataclass
class _Reading:
    """Follows the instructions of the pickles in one stream."""

    path: Path
    names: set[str] = field(default_factory=set)
    given: int = 0
    """Values given to functions, and used as keys."""
    count: int = 0

    def names_in(self, pickled: tuple[BinaryIO, int]) -> set[str]:
        """`module.name` of everything the pickles import."""
        file, number = pickled
        for _ in range(number):
            self._follow(file)
        return self.names

    def _follow(self, file: BinaryIO) -> None:
        stack: list[_Value | None] = []  # None is a mark
        memo: dict[int, _Value] = {}
        for opcode, argument in _opcodes(file):
            self.count += 1
            if self.count > MAX_OPCODES:
                raise DinobenchError(f"{self.path} has more than {MAX_OPCODES} pickle instructions: no checkpoint has")
            kind = _KINDS[opcode]
            if kind.puts:
                memo[len(memo) if argument is None else argument] = stack[-1] or _Value()
            elif kind.gets:
                stack.append(memo.get(argument, _Value()))
            elif kind.marks:
                stack.append(None)
            elif kind.pushes or kind.takes:
                made = self._made(opcode, argument, kind.taken_from(stack))
                stack.extend([made] * kind.pushes)

    def _made(self, opcode: str, argument: Any, taken: list[_Value]) -> _Value:
        """What an instruction makes of the values it takes from the stack."""
        if opcode in ("GLOBAL", "INST"):
            return self._named(str(argument).replace(" ", "."))
        if opcode == "STACK_GLOBAL":
            texts = [value.text for value in taken]
            return self._named(".".join(map(str, texts)) if all(texts) else "a name that the file computes")
        if isinstance(argument, (str, bytes)):
            return _Value(1 + len(argument) // _TEXT_BYTES, text=argument if isinstance(argument, str) else None)
        if opcode in _CALLS:
            self._give(sum(value.size for value in taken[1:]))
            if taken and taken[0].name == ENCODE and [value.text for value in taken[1].parts[1:]] != ["latin1"]:
                self.names.add(f"{ENCODE} to something else than latin1")
        if opcode in _GROWS:
            container, *rest = taken
            if opcode.startswith("SETITEM"):
                self._give(sum(key.size for key in rest[::2]))
            container.size = self._bounded(container.size + sum(value.size for value in rest))
            return container
        size = self._bounded(1 + sum([value.size for value in taken]))
        return _Value(size, parts=tuple(taken) if opcode.startswith("TUPLE") and len(taken) < 4 else ())

    def _named(self, name: str) -> _Value:
        self.names.add(name)
        return _Value(name=name)

    def _give(self, number: int) -> None:
        self.given = self._bounded(self.given + number)

    def _bounded(self, number: int) -> int:
        if number > MAX_VALUES:
            raise DinobenchError(
                f"{self.path} repeats its values until they are more than {MAX_VALUES}: no checkpoint does. It is "
                "refused because such a file can keep a reader busy for years or fill the memory; take another one"
            )
        return number


class _Kind:
    """How an instruction changes the stack."""

    def __init__(self, opcode: pickletools.OpcodeInfo) -> None:
        name = opcode.name
        self.puts, self.gets, self.marks = (
            name.endswith("PUT") or name == "MEMOIZE",
            name.endswith("GET"),
            name == "MARK",
        )
        before = opcode.stack_before
        self._to_mark = pickletools.markobject in before
        self._below = before.index(pickletools.markobject) if self._to_mark else len(before)
        self.takes, self.pushes = len(before), len(opcode.stack_after)

    def taken_from(self, stack: list[_Value | None]) -> list[_Value]:
        if not self.takes:
            return []
        taken: list[_Value | None] = []
        if self._to_mark:
            while (value := stack.pop()) is not None:
                taken.append(value)
        taken += [stack.pop() for _ in range(self._below)]
        return [value or _Value() for value in reversed(taken)]


_KINDS = {opcode.name: _Kind(opcode) for opcode in pickletools.opcodes}
_CALLS = frozenset({"REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ", "BUILD"})
_GROWS = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})


def _opcodes(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Instructions of the next pickle in a file; none where there is no further one."""
    try:
        for opcode, argument, _ in pickletools.genops(file):
            yield opcode.name, argument
    except ValueError:  # damaged, or the tensors of an old file: torch says what is wrong with it
        return
