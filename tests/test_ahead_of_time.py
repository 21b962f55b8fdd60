"""Every kernel compiles for each supported GPU generation, without a GPU, and its machine code is as it should be."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from machine_code import SHARED_BYTES, MachineCode, parse_machine_code

TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}

LISTING = """
 Function kernel:
  REG:75 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90a
		Function : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;    /* 0x00000000003b7819 */
        /*0020*/                   LDG.E.LTC128B.U16 R8, [R2.64] ;     /* 0x00000000003b7819 */
        /*0030*/              @UP1 LDGSTS.E.BYPASS.LTC128B.128 [R3] ;  /* 0x00000000003b7819 */
        /*0040*/                   LDLCU.64 R10, c[0x0][0x210] ;       /* 0x00008400ff0a7b82 */
        /*0050*/                   STL.64 [R1+0x8], R4 ;               /* 0x00000000003b7819 */
        /*0060*/                   LDL R4, [R1+0x8] ;                  /* 0x00000000003b7819 */
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ ; /* 0x00000000003b7819 */
        /*0080*/                   UTCHMMA gdesc[UR8], tmem[UR4] ;     /* 0x00000000003b7819 */
        /*0090*/                   UTCBAR [UR4], URZ ;                 /* 0x00000000003b7819 */
        /*00a0*/                   STG.E desc[UR4][R2.64], R4 ;        /* 0x00000000003b7819 */
        /*10b0*/                   EXIT ;                              /* 0x000000000000794d */
        /*10c0*/                   BRA 0x10c0;                         /* 0xfffffffc00fc7947 */
"""
TTIR = """
    %a = tt.dot %x, %y, %z, inputPrecision = tf32 : tensor<64x64xbf16> * tensor<64x32xbf16> -> tensor<64x32xf32>
    %b = tt.dot %u, %v, %w : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32> loc(#loc)
"""

TOY = """
import sys
sys.path.insert(0, {tests!r})
import ahead_of_time
import torch
import triton
import triton.language as tl
from sgmim_fast.kernels.language import dot

@triton.jit
def spilling(p_x, p_y, B: tl.constexpr):
    o = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    b_x = tl.load(p_x + o)
    tl.store(p_y + o, dot(b_x, dot(b_x, b_x, "ieee").to(tl.bfloat16), "ieee"))

@triton.jit
def scattered(p_x, p_y, stride, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_y + o, tl.load(p_x + o * stride))

@triton.jit
def broken(p_x, p_y):
    tl.store(p_y, tl.load(p_x) @ 1)

def launch():
    x = torch.empty(128, 128, dtype=torch.bfloat16, device="meta")
    spilling[(1, 2)](x, x, B=128, num_warps=4, maxnreg=32)
    scattered[(1,)](x, x, 48, B=256, num_warps=1)
    scattered[(1,)](x, x, 48, B=256, num_warps=1)
    broken[(1,)](x, x)

ahead_of_time.cases = lambda: [("toys", launch)]
sys.argv[1:] = ["--capability", "80"]
ahead_of_time.main()
"""


def start(script: str | Path, *words: str, output: IO[str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), *words]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, tuple[subprocess.Popen[str], Path]]]:
    """One process a capability, side by side."""
    folder = tmp_path_factory.mktemp("compilations")
    started = {}
    for capability in SHARED_BYTES:
        log = folder / f"{capability}.log"
        with log.open("w") as output:
            process = start(TESTS / "ahead_of_time.py", "--capability", str(capability), output=output)
        started[capability] = process, log
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile_to_good_machine_code(
    compilations: dict[int, tuple[subprocess.Popen[str], Path]], capability: int
) -> None:
    process, log = compilations[capability]
    status = process.wait(timeout=1500)
    lines = log.read_text().splitlines()
    complaints = [line for line in lines if line.startswith("error: ")]
    assert status == 0, "\n".join(complaints or lines[-20:])


def test_bad_kernels_are_found(tmp_path: Path) -> None:
    """What spills, reads number by number, does not compile, is launched in 2-D or by nobody is named."""
    script, log = tmp_path / "toy.py", tmp_path / "toy.log"
    script.write_text(TOY.format(tests=str(TESTS)))
    with log.open("w") as output:
        status = start(script, output=output).wait(timeout=300)
    assert status == 1
    complaints = [line for line in log.read_text().splitlines() if line.startswith("error: capability 80: ")]
    found = "\n".join(complaints or log.read_text().splitlines()[-20:])
    assert "spilling (B=128): it spills: " in found
    assert "spilling (B=128): its grid (1, 2) is not 1-D" in found
    assert found.count("scattered (B=256): no load is 16 bytes wide (loads by bits: {16: 8})") == 1
    assert "broken (toys): does not compile: " in found
    assert "masked_l1._forward is launched by no case; add one to cases()" in found
    assert "language.dot is launched by no case" not in found  # a kernel that was launched calls it


def test_machine_code_is_read_by_whole_opcodes() -> None:
    """Names that merely begin like another (LDLCU, UTCBAR) and cache hints (LTC128B) are something else."""
    code = parse_machine_code(LISTING, TTIR)
    assert code.registers == 75
    assert code.local_bytes == 24
    assert code.spills == 2
    assert code.matrix == {"HGMMA": 1, "UTCHMMA": 1}
    assert code.loads() == {128: 2, 16: 1}
    assert code.stores() == {32: 1}
    assert code.dots == ["bf16", "f32"]
    assert sum(code.opcodes.values()) == 13


@pytest.mark.parametrize(
    ("listing", "ttir"),
    [
        (LISTING.replace("REG:", "REGISTERS:"), TTIR),
        (LISTING.replace("EXIT", "LEAVE"), TTIR),
        (LISTING, TTIR.replace(" * ", ", ")),
    ],
)
def test_unknown_listings_are_refused(listing: str, ttir: str) -> None:
    with pytest.raises(ValueError, match=r"unknown way|as expected"):
        parse_machine_code(listing, ttir)


def test_bulk_copies_count_as_the_widest_loads() -> None:
    assert MachineCode(32, 0, {"UTMALDG.2D": 1, "LDG.E": 3}, []).loads() == {256: 1, 32: 3}
