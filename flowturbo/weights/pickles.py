"""The pickles in checkpoint files, looked through before they are loaded: what they name, call and copy.

torch's weights-only loader runs no foreign code, but calls what it knows with any arguments: a pickle of 53 bytes asks
for a bytearray of gigabytes. Here only what checkpoints are made of may be named, and calls cost what they seem to.
"""

from __future__ import annotations

import io
import pickletools
import tarfile

import torch

LONGEST = 4 << 20  # bytes of pickles in a file, SiT-XL/2's in training have 0.3 MiB; a byte may make an object of 72
SHARED = 8  # how many objects may copy a table that others have: Namespaces beside their own vars()
LEGACY_PICKLES = 5  # in a file of torch before 1.6: magic number, version, system, content, names of the storages

_KINDS = "Float Double Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble"
BUILDERS = {f"torch._utils _rebuild_{what}" for what in ("tensor", "tensor_v2", "parameter")}
EMPTY = {"collections OrderedDict", "argparse Namespace"}  # called without arguments, filled afterwards
FILLS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")  # put something into an object that stays
NAMES = BUILDERS | EMPTY | {f"torch {kind}Storage" for kind in _KINDS.split()}


class Refused(ValueError):
    """A pickle names what no checkpoint needs, or would cost too much."""


def check_pickles(path: str, is_zip: bool) -> None:
    """Look through the pickles of a checkpoint file, holding no more than LONGEST bytes of them.

    Raises Refused, and whatever damaged pickles and archives raise.
    """
    if is_zip:
        # By torch's own reader: two readers may find two files in an archive that was made for it.
        data = torch._C.PyTorchFileReader(path).get_record("data.pkl")
        if len(data) > LONGEST:
            raise Refused(f"a pickle of {len(data):,} bytes, expected at most {LONGEST:,}")
        check_pickle(io.BytesIO(data))
        return
    if tarfile.is_tarfile(path):  # torch before 0.1.10: unpacked to the disk before anything else is looked at
        raise Refused("a tar archive")
    with open(path, "rb") as file:
        stream = io.BytesIO(file.read(LONGEST))
    for _ in range(LEGACY_PICKLES):
        check_pickle(stream)


def check_pickle(stream: io.BytesIO) -> None:
    """Look through one pickle, and stand behind it. Raises Refused, and whatever a damaged one raises.

    Follows the pickle's stack: of each object only the name, where it is a global, or the operation that made it.
    """
    stack: list[str] = []
    memo: dict[object, str] = {}
    shared = 0
    for operation, argument, _ in pickletools.genops(stream):
        name, before = operation.name, operation.stack_before
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
            continue
        if name in ("BINGET", "LONG_BINGET"):
            known = memo[argument]
            stack.append(known if known in NAMES else "shared")
            continue
        if name == "GLOBAL" and argument not in NAMES:
            raise Refused(f"{str(argument).replace(' ', '.')}, expected tensors, numbers, texts and tables of them")
        if name in ("REDUCE", "NEWOBJ"):
            function, arguments = stack[-2:]
            if function not in BUILDERS and (function not in EMPTY or arguments != "EMPTY_TUPLE"):
                raise Refused(f"a call of {function.replace(' ', '.')} with arguments")
        if name == "BUILD":
            shared += stack[-1] != "EMPTY_DICT"
            if shared > SHARED:
                raise Refused("many copies of one table")
        taken = len(before)
        if pickletools.markobject in before:
            mark = len(stack) - 1 - stack[::-1].index("MARK")
            taken = len(stack) - mark + before.index(pickletools.markobject)
        made = str(argument) if name == "GLOBAL" else stack[-taken] if name in FILLS else name
        del stack[len(stack) - taken :]
        stack += [made] * len(operation.stack_after)
