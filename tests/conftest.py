"""Fixtures and rules that hold for every test."""

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported: kernels then run on the CPU, one program after the other.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# A shell starts what runs in the background deaf to Ctrl-C, and so would be the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Minutes each. What several processes share out (`make test`) must not begin with these last.
LONG = (
    "test_triton_golden.py",
    "test_faults.py",
    "test_exactness.py",
    "test_training.py",
    "test_ahead_of_time.py",
    "test_two_hosts.py",
    "test_training_options.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return LONG.index(item.path.name) if item.path.name in LONG else len(LONG)

    items.sort(key=place)


def roomy(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    __tracebackhide__ = True
    return call(*arguments, **options)


# Python keeps its frames in chunks of 16 KiB and gives an empty one back to the system at once. Where a loop's calls
# cross the edge of a chunk, as those of Triton's interpreter do, much of the time goes there. A frame of 320 KB
# brings a chunk of 512 KiB along.
roomy.__code__ = roomy.__code__.replace(co_stacksize=40_000)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    pyfuncitem.obj = partial(roomy, pyfuncitem.obj)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run side by side in several processes; threads in each would only fight for the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a browser that runs headless. Without one a test is skipped, except in CI, where it fails."""
    names = ("chromium", "chromium-browser", "google-chrome")
    for name in names:
        if path := shutil.which(name):
            return path
    message = f"none of {', '.join(names)} is on PATH; install one to run the browser tests"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs of 80 x 96 pixels."""
    from training_runs import write_pairs  # what it needs is not there where only kernels are tested

    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def two_ranks(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six uninterrupted steps on two ranks, checkpoints at 3 and 6; started as the `deepspeed` command starts them."""
    from training_runs import arguments, deepspeed_command, run, succeed

    output = tmp_path_factory.mktemp("two_ranks") / "run"
    watched = {"monitor__wandb": "offline", "monitor__profile_steps": "2 9", "monitor__peak_tflops": 0.5}
    out = succeed(run(deepspeed_command(2, arguments(pairs, output, **watched))))
    assert "MFU is of 0.5 TFLOP/s a device" in out
    assert "warning: --profile 9 leaves no trace: the run ends at 6" in out
    return output


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that kernels are given to write holds NaN first, so what they leave out shows."""

    def poison(allocate: Any) -> Any:
        def allocated(*args: Any, **options: Any) -> torch.Tensor:
            tensor = allocate(*args, **options)
            with torch.no_grad():
                return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocated

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
