"""Fixtures and rules that hold for every test."""

import os
import shutil

import pytest
import torch


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
