"""What the compiler made of a kernel: registers, spills, matrix instructions and widths of memory access, by SASS."""

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import triton

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory that one program may ask for, by compute capability."""

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", re.MULTILINE)
_ADDRESS = re.compile(r"\s*/\*([0-9a-f]{4,})\*/")
_RESOURCES = re.compile(r"\bREG:(\d+) STACK:(\d+)\b.*?\bLOCAL:(\d+)\b")
_MATRIX = re.compile(r"(UTC)?[A-Z]?G?MMA")  # HMMA, HGMMA, IMMA, QGMMA, UTCHMMA, ...
_DOT = re.compile(r"\btt\.dot\b[^\n]*: tensor<[\dx]+x(\w+)> \* tensor<[\dx]+x(\w+)>")
_WIDTHS = {"8": 8, "U8": 8, "S8": 8, "16": 16, "U16": 16, "S16": 16, "64": 64, "128": 128, "ENL2": 256}
_BULK = ("UBLKCP", "UTMALDG", "UTMASTG")  # copies by the tensor memory accelerator


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel."""

    registers: int
    """A thread."""
    local_bytes: int
    """Stack and local memory of a thread: what does not fit in registers."""
    opcodes: dict[str, int]
    """Instructions by opcode with its modifiers, as in ``LDG.E.128``."""
    dots: list[str]
    """Operand types of its matrix products, as in ``bf16``, each once."""

    @property
    def spills(self) -> int:
        """Instructions that read or write local memory."""
        return sum(number for opcode, number in self.opcodes.items() if opcode.split(".")[0] in ("LDL", "STL"))

    @property
    def matrix(self) -> dict[str, int]:
        """Matrix instructions by name."""
        found: Counter[str] = Counter()
        for opcode, number in self.opcodes.items():
            if _MATRIX.fullmatch(name := opcode.split(".")[0]):
                found[name] += number
        return dict(found)

    def loads(self) -> dict[int, int]:
        """Instructions that read global memory, by bits a thread; copies in bulk count as the widest."""
        return self._accesses("LDG", "LDGSTS", *_BULK[:2])

    def stores(self) -> dict[int, int]:
        """Likewise for instructions that write."""
        return self._accesses("STG", _BULK[2])

    def _accesses(self, *names: str) -> dict[int, int]:
        found: Counter[int] = Counter()
        for opcode, number in self.opcodes.items():
            name, *modifiers = opcode.split(".")
            if name in names:
                width = max((_WIDTHS[word] for word in modifiers if word in _WIDTHS), default=32)
                found[256 if name in _BULK else width] += number
        return dict(sorted(found.items(), reverse=True))


def read_machine_codes(kernels: Sequence[Any], capability: int) -> list[MachineCode]:
    """Disassemble each ``triton.compiler.CompiledKernel`` with the tools in Triton's own package.

    Starting the disassembler takes far longer than reading a kernel, so it reads all instructions in one go, one kernel
    behind the other.
    """
    codes = [_instructions(kernel.asm["cubin"]) for kernel in kernels]
    ends = list(accumulate(map(len, codes)))
    listings: list[list[str]] = [[] for _ in kernels]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernels.bin")
        file.write_bytes(b"".join(codes))
        target = f"SM{capability}a" if capability >= 90 else f"SM{capability}"
        for line in _told(triton.knobs.nvidia.nvdisasm.path, "-b", target, str(file)).splitlines():
            if place := _ADDRESS.match(line):
                listings[bisect_right(ends, int(place[1], 16))].append(line)
        found = []
        for kernel, lines in zip(kernels, listings, strict=True):
            file.write_bytes(kernel.asm["cubin"])
            resources = _told(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
            found.append(parse_machine_code("\n".join([resources, *lines]), kernel.asm["ttir"]))
    return found


def _told(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _instructions(cubin: bytes) -> bytes:
    """The one section of an ELF file whose name begins with ``.text.``.

    Source: the ELF-64 object file format, headers of file and sections.

    Raises:
        ValueError: if there is none, or are more.
    """
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + number * size) for number in range(count)]
    texts = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", headers[names][4] + name)
    ]
    if len(texts) != 1:
        raise ValueError(f"a compiled kernel holds {len(texts)} sections of instructions instead of one")
    return texts[0]


def parse_machine_code(listing: str, ttir: str) -> MachineCode:
    """From the listings of ``cuobjdump -res-usage`` and a disassembler, and Triton's intermediate code.

    Raises:
        ValueError: if either is written in a way that this function does not know.
    """
    resources = _RESOURCES.findall(listing)
    opcodes = Counter(_INSTRUCTION.findall(listing))
    if len(resources) != 1 or not any(opcode.split(".")[0] == "EXIT" for opcode in opcodes):
        raise ValueError("the listing does not hold one kernel as expected")
    operands = _DOT.findall(ttir)
    if len(operands) != len(re.findall(r"\btt\.dot(?:_scaled)?\b", ttir)):
        raise ValueError("a tt.dot of the intermediate code is written in an unknown way")
    registers, stack, local = map(int, resources[0])
    return MachineCode(registers, stack + local, opcodes, sorted({name for pair in operands for name in pair}))
