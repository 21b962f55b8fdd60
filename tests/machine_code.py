"""What the compiler made of a kernel: registers, spills, matrix instructions and widths of memory access, by SASS."""

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory that one program may ask for, by compute capability."""

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", re.MULTILINE)
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


def read_machine_code(kernel: Any, cache: Path) -> MachineCode:
    """Disassemble a ``triton.compiler.CompiledKernel`` with the tools in Triton's own package.

    What was found is kept in the folder ``cache``: disassembling takes as long as compiling.
    """
    cubin, ttir = kernel.asm["cubin"], kernel.asm["ttir"]
    here = Path(__file__).read_bytes()
    path = cache / f"{hashlib.sha256(here + cubin + ttir.encode()).hexdigest()}.json"
    if path.exists():
        return MachineCode(**json.loads(path.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = parse_machine_code(text, ttir)
        file.write_text(json.dumps(vars(found)), encoding="utf-8")
        os.replace(file, path)
    return found


def parse_machine_code(listing: str, ttir: str) -> MachineCode:
    """From the listing of ``cuobjdump -sass -res-usage`` and Triton's intermediate code.

    Raises:
        ValueError: if either is written in a way that this function does not know.
    """
    resources = _RESOURCES.findall(listing)
    opcodes = Counter(_INSTRUCTION.findall(listing))
    if len(resources) != 1 or not any(opcode.split(".")[0] == "EXIT" for opcode in opcodes):
        raise ValueError("cuobjdump's listing does not hold one kernel as expected")
    operands = _DOT.findall(ttir)
    if len(operands) != len(re.findall(r"\btt\.dot(?:_scaled)?\b", ttir)):
        raise ValueError("a tt.dot of the intermediate code is written in an unknown way")
    registers, stack, local = map(int, resources[0])
    return MachineCode(registers, stack + local, opcodes, sorted({name for pair in operands for name in pair}))
