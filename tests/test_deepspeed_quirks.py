"""What DeepSpeed is kept from doing before a run."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from sgmim_fast.train.deepspeed_quirks import spare_needless_work
spare_needless_work()
print(os.environ.get("TORCHDYNAMO_DISABLE"))
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # as deepspeed.initialize does
print("torch._inductor.compile_fx" in sys.modules)
import torch
print(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item(), torch._dynamo.utils.counters["frames"])
"""


@pytest.mark.parametrize("before", [None, "0"])
def test_an_engine_does_not_import_the_compiler_and_a_run_may_compile(before: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    if before is not None:
        environment["TORCHDYNAMO_DISABLE"] = before
    environment |= {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    switch, imported, compiled = done.stdout.splitlines()[-3:]
    assert switch == str(before)
    assert imported == "False"
    assert compiled.startswith("1.0 ")
    assert "'ok': 1" in compiled
