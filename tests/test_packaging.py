"""What is installed is what is in the repository: built as a wheel, and editable, imported from elsewhere."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import sgmim_fast

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index"]
SHOW_FILES = "import sgmim_fast, sgmim_fast.kernels; print(sgmim_fast.__file__, sgmim_fast.kernels.__file__, sep='\\n')"


def run(command: list[str], cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def imported_files(site: Path, cwd: Path, before: str = "") -> list[Path]:
    """Files that the package and its kernels are imported from, with ``site`` in place of an installed copy.

    ``-S`` leaves out the .pth files of the environment, which may hold an editable install of the repository.
    """
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    output = run([sys.executable, "-S", "-c", before + SHOW_FILES], cwd, PYTHONPATH=path)
    return [Path(line) for line in output.splitlines()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, so that building leaves nothing in the repository and finds nothing stale."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder)
    for name in ("sgmim_fast", "kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", *OFFLINE, "--wheel-dir", str(folder), str(checkout)], folder)
    (built,) = folder.glob("*.whl")
    return built


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (entry for entry in archive.namelist() if entry.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path, checkout: Path) -> None:
    """A folder without __init__.py or a kind of data that setup.py does not name would be left out; tests must be."""
    files = {path.relative_to(checkout).as_posix() for path in (checkout / "sgmim_fast").rglob("*") if path.is_file()}
    files |= {f"sgmim_fast/kernels/{path.name}" for path in (checkout / "kernels").iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == files


def test_wheel_metadata(wheel: Path) -> None:
    fields = message_from_string(metadata(wheel, "METADATA"))
    assert fields["Name"] == "sgmim-fast"
    assert fields["Version"] == sgmim_fast.__version__
    assert fields["Requires-Python"] == ">=3.11"
    extras = {"dali", "xformers", "float8", "maps", "wandb", "export", "dev", "all"}
    assert extras == set(fields.get_all("Provides-Extra", []))
    assert metadata(wheel, "entry_points.txt").split("\n")[:2] == ["[console_scripts]", "sgmim = sgmim_fast.cli:main"]


def test_installed_wheel_imports_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run([*PIP, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], tmp_path)
    package = site / "sgmim_fast"
    assert imported_files(site, tmp_path) == [package / "__init__.py", package / "kernels" / "__init__.py"]
    assert (site / "bin" / "sgmim").is_file()


def test_editable_install_imports_from_anywhere(checkout: Path, tmp_path: Path) -> None:
    """In the checkout itself the folder sgmim_fast hides the installed package, but not its kernels."""
    site = tmp_path / "site"
    run([*PIP, "install", *OFFLINE, "--target", str(site), "--editable", str(checkout)], tmp_path)
    expected = [checkout / "sgmim_fast" / "__init__.py", checkout / "kernels" / "__init__.py"]
    start_up = f"import site; site.addsitedir({str(site)!r}); "
    for folder in (checkout, tmp_path):
        assert [path.resolve() for path in imported_files(site, folder, start_up)] == expected


def test_constraints_pin_every_requirement(wheel: Path) -> None:
    """`make setup` is repeatable only if each package that setup.py names has one version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    required = message_from_string(metadata(wheel, "METADATA")).get_all("Requires-Dist", [])
    names = {line.split(";")[0].split(">=")[0].strip().lower() for line in required}
    assert {"torch", "deepspeed", "pytest"} <= names
    assert names <= pins.keys()
