"""Package metadata. The build backend and the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Read, not imported: building must not need torch.
FACE = Path(__file__).with_name("sgmim_fast") / "__init__.py"
VERSION = re.findall(r'^__version__ = "(.+)"$', FACE.read_text(encoding="utf-8"), re.MULTILINE)
if len(VERSION) != 1:
    raise SystemExit('error: sgmim_fast/__init__.py must hold one line of the form __version__ = "1.2.3"')

LINUX_ON_64_BITS = "sys_platform == 'linux' and (platform_machine == 'x86_64' or platform_machine == 'aarch64')"
DALI = ["nvidia-dali-cuda130>=2.4"]
XFORMERS = ["xformers>=0.0.35"]
FLOAT8 = ["torchao>=0.18"]
MAPS = ["transformers>=5.0"]
WANDB = ["wandb>=0.31"]
EXPORT = ["transformers>=5.0", "onnx>=1.20", "onnxruntime>=1.23", "onnxscript>=0.6"]

setup(
    name="sgmim-fast",
    version=VERSION[0],
    description="Fast pre-training by masked image modelling guided by structure maps (SG-MIM)",
    python_requires=">=3.11",
    packages=[*find_packages(include=["sgmim_fast", "sgmim_fast.*"]), "sgmim_fast.kernels"],
    # The folder is named kernels, but a public package owns that import name.
    package_dir={"sgmim_fast.kernels": "kernels"},
    package_data={"": ["*.html"]},
    install_requires=[
        "torch>=2.11",
        f"triton>=3.6; {LINUX_ON_64_BITS}",
        "timm>=1.0",
        "deepspeed>=0.19",
        "huggingface_hub>=1.0",
        "segmentation-models-pytorch>=0.5",
        "torchmetrics>=1.6",
        "numpy>=2.0",
        "pillow>=11.0",
        "psutil>=6.0",
        "safetensors>=0.5",
        "tyro>=1.0",
        "rich>=14.0",
        "tensorboard>=2.18",
        "pyyaml>=6.0",
    ],
    extras_require={
        "dali": DALI,
        "xformers": XFORMERS,
        "float8": FLOAT8,
        "maps": MAPS,
        "wandb": WANDB,
        "export": EXPORT,
        "all": [*DALI, *XFORMERS, *FLOAT8, *MAPS, *WANDB, *EXPORT],
        "dev": [
            *DALI,
            *FLOAT8,
            *MAPS,
            *WANDB,
            *EXPORT,
            "build>=1.2",
            "hypothesis>=6.100",
            "mypy>=2.0",
            "pytest>=9.0",
            "pytest-xdist>=3.6",
            "ruff>=0.17",
            "setuptools>=77",
            "types-psutil",
            "types-PyYAML",
            "wheel",
        ],
    },
    entry_points={"console_scripts": ["sgmim = sgmim_fast.cli:main"]},
)
