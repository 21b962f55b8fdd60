"""The stages of an experiment: pre-train an arm, probe its encoder, fine-tune it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.replicating.arms import Arm, encoder_of, initial_encoder, make_task
from benchmarks.replicating.scenes import DenseScenes, SceneFolders, open_maps, set_of
from benchmarks.replicating.sets import TEST_SETS, ClassesOfSets, DepthOfSets, flat
from benchmarks.replicating.sizes import USUAL, Size, Variant
from benchmarks.replicating.stepping import Cost, Stepper, batches, train
from sgmim_fast.backbones import create_backbone
from sgmim_fast.config import (
    BackboneConfig,
    DataConfig,
    DepthEvalConfig,
    FinetuneOptimizerConfig,
    PretrainConfig,
    SegmentationEvalConfig,
    TrainConfig,
)
from sgmim_fast.data.batches import Batch
from sgmim_fast.data.dense.evaluation import evaluation_samples
from sgmim_fast.data.dense.training import DenseKey, DepthTraining, LabelTraining, dense_order
from sgmim_fast.data.order import SampleOrder
from sgmim_fast.data.pair_samples import PairDataset, SampleKey
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.probing.data import Kind, ProbeSplits
from sgmim_fast.probing.features import BackboneFeatures, Features, RowColour
from sgmim_fast.probing.probes import CONSTANT, GRID_TARGET, run_probes
from sgmim_fast.probing.settings import Probe, ProbeSettings
from sgmim_fast.tasks.evaluation import DepthCounts, SegmentationCounts
from sgmim_fast.tasks.finetuned import DenseTask, backbone_options
from sgmim_fast.tasks.finetuned import make_task as make_dense_task
from sgmim_fast.train.finetune_schedule import poly_rate, triangle_rate
from sgmim_fast.train.layer_decay import layer_decay_groups
from sgmim_fast.train.optim import learning_rate, parameter_groups

Weights = dict[str, Tensor]
_CURVE = 20  # points of a recorded loss curve
_LAST = 10  # one in so many steps, the last ones, makes the final loss


@dataclass(frozen=True)
class Result:
    """What a stage came to."""

    figures: dict[str, Any]
    """Reproduced to the last digit by the same settings on the same kind of machine."""
    cost: dict[str, float]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Figures of each test image, for the bootstrap."""


# -- pre-training


def pretrain_config(size: Size, arm: Arm, seed: int) -> PretrainConfig:
    """What the batches of an arm are drawn by. Maps are loaded in every arm, so that all wait for the same data."""
    model = replace(size.model, guidance="relational", structure_channels=arm.config(size.model).structure_channels)
    return PretrainConfig(model=model, data=DataConfig(workers=0), train=TrainConfig(seed=seed, precision="fp32"))


def pretrain_batches(size: Size, arm: Arm, seed: int, folders: SceneFolders, steps: int) -> Iterator[Batch]:
    """The first batches of an arm's pre-training: images, order, crops and masks are those of every arm of the seed."""
    pairs, config = open_maps(folders, arm.maps), pretrain_config(size, arm, seed)
    order = SampleOrder(len(pairs), batch_size=size.pretrain_batch, world_size=1, accumulation_steps=1, seed=seed)
    dataset = PairDataset(config)
    return batches(
        dataset,
        lambda epoch, index: SampleKey.of(pairs, config, epoch, index),
        order,
        steps,
        size.loading_threads,
    )


def pretrain(
    size: Size, arm: Arm, seed: int, folders: SceneFolders, variant: Variant = USUAL
) -> tuple[Weights, Result]:
    """The encoder's weights after pre-training, and losses and cost."""
    device = torch.device(size.device)
    if arm.kind is None:
        weights = initial_encoder(size.model, seed)
        weights.pop("mask_token")
        return weights, Result({}, {})
    task = make_task(arm, size.model, seed).to(device)
    settings = replace(size.pretrain, lr=size.pretrain.lr * variant.rate)
    steps = size.steps(variant)
    stepper = Stepper(task, parameter_groups(task, settings.weight_decay), settings, size.precision)
    torch.manual_seed(seed)
    losses, cost = train(
        task,
        stepper,
        pretrain_batches(size, arm, seed, folders, steps),
        lambda step: learning_rate(step, steps, size.pretrain_batch, settings, size.schedule),
        device,
    )
    stepper.finish()
    return encoder_of(task), Result(_losses(losses, ("loss", "image_loss", "structure_loss")), cost.row())


def _losses(losses: list[tuple[float | None, ...]], names: tuple[str, ...]) -> dict[str, Any]:
    """Means over the last tenth of the steps, and the curve of the first of them as means over equal parts."""
    last = losses[-max(1, len(losses) // _LAST) :]
    figures: dict[str, Any] = {}
    for number, name in enumerate(names):
        values = [row[number] for row in last]
        if None not in values:
            figures[name] = fmean(value for value in values if value is not None)
    parts = np.array_split(np.array([row[0] for row in losses], dtype=np.float64), min(_CURVE, len(losses)))
    return figures | {"curve": [round(float(part.mean()), 6) for part in parts]}


# -- the encoder put to use


def make_backbone(size: Size, weights: Mapping[str, Tensor], **options: Any) -> Backbone:
    """A backbone with an arm's encoder."""
    config = BackboneConfig.from_pretraining(size.model, **options)
    return create_backbone(config, weights={f"encoder.{name}": value for name, value in weights.items()})


def probe_features(size: Size, weights: Mapping[str, Tensor] | None) -> Features:
    """Features of all maps of an encoder, and row and column; None for row, column and mean colour alone.

    Swin knows little of where a token is; so it is asked what it tells beyond that.
    """
    if weights is None:
        return Features(RowColour())
    backbone = make_backbone(size, weights, norm="last", pyramid=False).to(size.device)
    return Features(BackboneFeatures(backbone, place=True))


def probe(size: Size, features: Features, seed: int, labels: int, scenes: DenseScenes) -> Result:
    """Linear and nearest-neighbour probes of depth and of classes, scored on both sets of test scenes."""
    figures: dict[str, Any] = {}
    seconds = 0.0
    settings = ProbeSettings(
        train_images=labels,
        val_images=len(TEST_SETS) * size.test_scenes,
        seed=seed,
        tokens=max(size.probe_tokens, labels),
        folds=size.probe_folds,
    )
    probes: dict[Kind, tuple[Probe, ...]] = {
        "depth": ("depth", "knn-depth"),
        "segmentation": ("segmentation", "knn-segmentation"),
    }
    for kind, names in probes.items():
        target = (
            DepthOfSets(size.depth.min_depth, size.depth.max_depth, "none")
            if kind == "depth"
            else ClassesOfSets(size.segmentation.classes)
        )
        splits = ProbeSplits(kind, scenes.split(kind, "train"), scenes.split(kind, "val"), target)
        report = run_probes(features, splits, names, settings)
        for name in (*names, CONSTANT, GRID_TARGET):
            label = name if name in names else f"{name} {kind}"
            figures[label] = report[name].figures
            seconds += report[name].seconds
        figures[f"{kind} strength"] = report[names[0]].chosen["strength"]
        figures[f"{kind} train_sha256"] = report.train_sha256
    return Result(figures, {"probe_seconds": round(seconds, 3)})


def finetune(
    kind: Kind, size: Size, weights: Mapping[str, Tensor], seed: int, labels: int, scenes: DenseScenes
) -> tuple[DenseTask, Result]:
    """A task trained on labelled scenes with everything but the arm's weights equal, and its figures on test scenes."""
    device = torch.device(size.device)
    head = size.depth if kind == "depth" else size.segmentation
    torch.manual_seed(seed)
    backbone = make_backbone(size, weights, drop_path_rate=0.0, **backbone_options(head))
    task = make_dense_task(backbone, head).to(device)
    samples = scenes.labelled(kind, labels, seed)
    dataset: DepthTraining | LabelTraining
    if kind == "depth":
        dataset = DepthTraining(scenes.depth, samples.decoder, seed=seed, max_depth=size.depth.max_depth)
        peak = size.depth_lr
    else:
        dataset = LabelTraining(scenes.labels, samples.decoder, seed=seed)
        peak = size.segmentation_lr
    order = dense_order(samples, batch_size=size.finetune_batch, accumulation_steps=1, world_size=1, seed=seed)
    settings = FinetuneOptimizerConfig(lr=peak, layer_decay=size.layer_decay)
    groups = layer_decay_groups(task, settings.weight_decay, settings.layer_decay)
    stepper = Stepper(task, groups, settings, size.precision)
    steps = size.finetune_steps

    def rate(step: int) -> float:
        if kind == "depth":
            return triangle_rate(step, 1, steps, peak / 20, peak)
        return poly_rate(step, steps, peak, warmup_steps=max(1, steps // 10))

    torch.manual_seed(seed)
    source = batches(
        dataset,
        lambda epoch, index: DenseKey(epoch, index, *samples.members(index)),
        order,
        steps,
        size.loading_threads,
    )
    losses, cost = train(task, stepper, source, rate, device)
    stepper.finish()
    return task, _evaluated(kind, size, task, scenes, losses, cost)


def _evaluated(
    kind: Kind, size: Size, task: DenseTask, scenes: DenseScenes, losses: list[tuple[float | None, ...]], cost: Cost
) -> Result:
    """Figures over each set of test scenes, and of each of them."""
    device = torch.device(size.device)

    def make() -> DepthCounts | SegmentationCounts:
        if kind == "depth":
            return DepthCounts(size.depth, DepthEvalConfig(flip=True), device)
        return SegmentationCounts(size.segmentation, SegmentationEvalConfig(mode="whole"), device)

    counts = {name: make() for name in TEST_SETS}
    single: dict[str, list[np.ndarray]] = {name: [] for name in TEST_SETS}
    task.eval()
    test = scenes.split(kind, "val")
    for sample in evaluation_samples(test, range(len(test))):
        name = set_of(sample.name)
        before = counts[name].state.cpu().clone()
        counts[name].count(task, sample)
        single[name].append((counts[name].state.cpu() - before).numpy())
    found = {name: count.compute() | count.details(test.class_names) for name, count in counts.items()}
    figures = {"train_loss": _losses(losses, ("loss",))["loss"], **flat(found)}
    return Result(figures, cost.row(), {name: np.stack(values) for name, values in single.items()})
