"""Speed and memory, measured and recorded. Needs torch, triton, numpy and timm alone, and no installation.

Importing this package makes ``sgmim_fast.kernels`` importable from a checkout in which nothing is installed, where
otherwise only ``setup.py`` knows that its folder is named ``kernels``.
"""

from pathlib import Path

import sgmim_fast

sgmim_fast.__path__.append(str(Path(__file__).parents[1]))
