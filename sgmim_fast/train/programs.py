"""The kinds of runs: what is typed, what ``--help`` says, which recipes there are."""

from sgmim_fast.config import DepthRunConfig, PretrainConfig, SegmentationRunConfig
from sgmim_fast.finetune_recipes import DEPTH_RECIPES, SEGMENTATION_RECIPES
from sgmim_fast.recipes import RECIPES
from sgmim_fast.train.arguments import Program

_FINETUNE = """Fine-tune a pre-trained backbone on {what}.

Start it with a launcher, one process a GPU (or, without GPUs, a CPU rank each):
  sgmim finetune {kind} --num-gpus 2 --recipe {recipe} --data DIR --backbone.weights runs/one --output runs/two
  deepspeed --num_gpus 2 --module sgmim_fast.finetune {kind} --recipe {recipe} --data DIR --weights runs/one ...
  torchrun --nproc-per-node 2 -m sgmim_fast.finetune {kind} --recipe {recipe} --data DIR --weights runs/one ...

--recipe NAME   start from one of: {{recipes}} (default: folder); with it, --help shows its settings
--config FILE   YAML with any of the options below, nested by their dots
--data PATH     short for --data.path
--weights PATH  short for --backbone.weights
--compile       short for --train.compile
--profile STEPS short for --monitor.profile-steps
"""
_SHORT = {
    "--data": "--data.path",
    "--compile": "--train.compile",
    "--no-compile": "--train.no-compile",
    "--profile": "--monitor.profile-steps",
}

PRETRAIN: Program[PretrainConfig] = Program(
    kind="pretrain",
    command="sgmim pretrain",
    description="""Pre-train an encoder by SG-MIM on a folder of image and structure-map pairs.

Start it with a launcher, one process a GPU (or, without GPUs, a CPU rank each):
  deepspeed --num_gpus 2 --module sgmim_fast.pretrain --recipe swin_base_100ep --data DIR --output runs/one
  torchrun --nproc-per-node 2 -m sgmim_fast.pretrain --recipe swin_base_100ep --data DIR --output runs/one
  sgmim pretrain --num-gpus 2 --recipe swin_base_100ep --data DIR --output runs/one

--recipe NAME   start from one of: {recipes}
--config FILE   YAML with any of the options below, nested by their dots
--data PATH     short for --data.path
--loader NAME   short for --data.loader
--compile       short for --train.compile
--profile STEPS short for --monitor.profile-steps
""",
    recipes=RECIPES,
    recipe="swin_base_100ep",
    short=_SHORT | {"--loader": "--data.loader"},
)

DEPTH: Program[DepthRunConfig] = Program(
    kind="depth",
    command="sgmim finetune depth",
    description=_FINETUNE.format(what="monocular depth", kind="depth", recipe="nyu"),
    recipes=DEPTH_RECIPES,
    recipe="folder",
    short=_SHORT | {"--weights": "--backbone.weights"},
)

SEGMENTATION: Program[SegmentationRunConfig] = Program(
    kind="segmentation",
    command="sgmim finetune segmentation",
    description=_FINETUNE.format(what="semantic segmentation", kind="segmentation", recipe="ade20k"),
    recipes=SEGMENTATION_RECIPES,
    recipe="folder",
    short=_SHORT | {"--weights": "--backbone.weights"},
)

FINETUNE: dict[str, Program[DepthRunConfig] | Program[SegmentationRunConfig]] = {
    program.kind: program for program in (DEPTH, SEGMENTATION)
}
"""By task."""
