"""Pictures of one seed: what fine-tuned arms predict, how features look, and their spectra."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.replicating.charts import Panel, Point, render_panels
from benchmarks.replicating.looking import component_colours, relative_log_amplitudes
from benchmarks.replicating.pieces import Piece, variant_of
from benchmarks.replicating.running import Runner
from benchmarks.replicating.sizes import Variant
from benchmarks.replicating.stages import Weights, finetune, make_backbone
from sgmim_fast.data.dense.evaluation import EvaluationSample, evaluation_samples
from sgmim_fast.errors import UserError
from sgmim_fast.probing.data import Kind
from sgmim_fast.tasks.pictures import Picture, class_picture, depth_limits, depth_picture, image_picture

SHOWN = 4
"""Test scenes in a picture, evenly from all over them."""
SPECTRUM_SCENES = 50
_SIDE = 128  # pixels of a tile
_TITLE = 16


@dataclass(frozen=True)
class Column:
    """Tiles under a title."""

    title: str
    tiles: Sequence[Picture]


def write_figures(runner: Runner, arms: Sequence[str], seed: int, variant: Variant, folder: Path) -> list[Path]:
    """Write pictures of the arms whose weights are in the work folder, fine-tuned with the fewest labels.

    Raises:
        UserError: if there are no weights.
    """
    found = {}
    for arm in arms:
        piece = Piece(arm, seed, "pretrain", None, variant_of(arm, variant))
        if runner.weights_file(piece).is_file():
            found[arm] = runner.weights(piece)
    if not found:
        raise UserError(f"{runner.work} holds no weights of seed {seed}; run it without --figures first")
    torch.set_num_threads(runner.size.threads)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in ("depth", "segmentation"):
        written.append(folder / f"claim_{kind}.png")
        sheet(predictions(runner, kind, found, seed)).save(written[-1])
    features = {arm: feature_maps(runner, weights, SPECTRUM_SCENES) for arm, weights in found.items()}
    columns = [Column("image", [image_picture(sample.image) for sample in _samples(runner, "depth", SHOWN)])]
    for arm, weights in found.items():
        colours = component_colours([joint_map(maps) for maps in feature_maps(runner, weights, SHOWN)])
        columns.append(Column(arm, [_bytes(values) for values in colours]))
    written.append(folder / "claim_features.png")
    sheet(columns).save(written[-1])
    written.append(folder / "claim_spectrum.svg")
    written[-1].write_text(spectra(features), encoding="utf-8")
    return written


def feature_maps(runner: Runner, weights: Weights, count: int) -> list[list[Tensor]]:
    """All maps (C, h, w) of an encoder for some test scenes."""
    backbone = make_backbone(runner.size, weights, norm="last", pyramid=False).to(runner.size.device).eval()
    with torch.no_grad():
        return [
            [values[0].float().cpu() for values in backbone(sample.image[None].to(runner.size.device))]
            for sample in _samples(runner, "depth", count)
        ]


def joint_map(maps: Sequence[Tensor]) -> Tensor:
    """Maps (C, h, w) of one image side by side on the grid of the second, 8 pixels a token, as probes have them."""
    grid = maps[1].shape[-2:]
    return torch.cat([_on_grid(values[None], grid)[0] for values in maps])


def _on_grid(values: Tensor, grid: torch.Size) -> Tensor:
    if values.shape[-1] >= grid[-1]:
        return F.adaptive_avg_pool2d(values, list(grid))
    return F.interpolate(values, size=grid, mode="bilinear", align_corners=False)


def spectra(features: dict[str, list[list[Tensor]]]) -> str:
    """An SVG of relative log amplitudes: a panel for each map of the encoder, a line for each arm."""
    levels = len(next(iter(features.values()))[0])
    panels = []
    for level in range(levels):
        lines = {}
        for arm, images in features.items():
            pairs = zip(*relative_log_amplitudes(maps[level] for maps in images), strict=True)
            lines[arm] = [Point(x, y) for x, y in pairs]
        panels.append(Panel(f"relative log amplitude, map {level + 1}", "frequency / pi", lines, "linear", (0, 0.5, 1)))
    return render_panels(panels)


def predictions(runner: Runner, kind: Kind, found: Mapping[str, Weights], seed: int) -> list[Column]:
    """Test scenes, their truth, and what each arm says of them after fine-tuning with the fewest labels."""
    samples = _samples(runner, kind, SHOWN)
    classes = runner.size.segmentation.classes
    limits = [depth_limits(sample.target) for sample in samples] if kind == "depth" else []

    def pictures(values: Sequence[Tensor]) -> list[Picture]:
        if kind == "segmentation":
            return [class_picture(labels, classes) for labels in values]
        return [depth_picture(depth, of) for depth, of in zip(values, limits, strict=True)]

    columns = [
        Column("image", [image_picture(sample.image) for sample in samples]),
        Column("truth", pictures([sample.target for sample in samples])),
    ]
    for arm, weights in found.items():
        task, _ = finetune(kind, runner.size, weights, seed, runner.size.labels[0], runner.scenes)
        with torch.no_grad():
            said = [task.predict(sample.image[None].to(runner.size.device))[0].cpu() for sample in samples]
        columns.append(Column(arm, pictures([x.argmax(0) if kind == "segmentation" else x[0] for x in said])))
    return columns


def sheet(columns: Sequence[Column]) -> Image.Image:
    """Columns of tiles side by side, each tile enlarged without smoothing."""
    rows = max(len(column.tiles) for column in columns)
    page = Image.new("RGB", (len(columns) * (_SIDE + 4), rows * (_SIDE + 4) + _TITLE), "white")
    draw = ImageDraw.Draw(page)
    for x, column in enumerate(columns):
        draw.text((x * (_SIDE + 4) + 2, 2), column.title, fill="black")
        for y, tile in enumerate(column.tiles):
            large = Image.fromarray(tile).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
            page.paste(large, (x * (_SIDE + 4), y * (_SIDE + 4) + _TITLE))
    return page


def _bytes(colours: Tensor) -> Picture:
    return (colours * 255).round().byte().permute(1, 2, 0).numpy()


def _samples(runner: Runner, kind: Kind, count: int) -> list[EvaluationSample]:
    test = runner.scenes.split(kind, "val")
    count = min(count, len(test))
    return list(evaluation_samples(test, [number * len(test) // count for number in range(count)]))
