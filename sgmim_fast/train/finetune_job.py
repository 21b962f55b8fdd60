"""Fine-tuning on a dense task, as the engine runs it."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from sgmim_fast.backbones import create_backbone
from sgmim_fast.config import FROM_SCRATCH, FROM_WEIGHTS, BackboneConfig, Backend, FinetuneConfig
from sgmim_fast.data.batches import Loader
from sgmim_fast.data.dense.evaluation import evaluation_samples
from sgmim_fast.data.dense.folders import Split
from sgmim_fast.data.dense.samples import DenseSamples
from sgmim_fast.data.dense.training import build_dense_loader, dense_order
from sgmim_fast.data.order import Place, SampleOrder
from sgmim_fast.data.substitution import BadSample
from sgmim_fast.errors import UserError
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.models.float8 import use_float8
from sgmim_fast.models.norms import use_norm
from sgmim_fast.tasks.evaluation import Counts
from sgmim_fast.tasks.finetuned import DenseTask, TaskConfig, backbone_options, make_task, save_finetuned
from sgmim_fast.train.finetune_schedule import poly_rate, triangle_rate
from sgmim_fast.train.flops import task_flops_per_image
from sgmim_fast.train.job import Job
from sgmim_fast.train.layer_decay import layer_decay_groups
from sgmim_fast.train.run_folder import WEIGHTS, latest_checkpoint

FineConfig = TypeVar("FineConfig", bound=FinetuneConfig)


class FinetuneJob(Job[FineConfig]):
    """A backbone with weights, a new head, and images with a target a pixel."""

    doing = "fine-tuning"
    evaluates = True
    free = ("evaluation.", "evaluate_every", "backbone.weights", "data.train_list", "data.val_list")

    # -- of each task

    @property
    @abstractmethod
    def head(self) -> TaskConfig:
        """The part of the configuration about the head."""

    @abstractmethod
    def open_split(self, split: Split) -> DenseSamples:
        """The images of "train" or "val"."""

    @abstractmethod
    def target(self, size: int, height: int, width: int) -> dict[str, Tensor]:
        """A batch's targets."""

    @abstractmethod
    def counts(self, device: torch.device) -> Counts:
        """A new evaluation."""

    def notes(self) -> dict[str, Any]:
        """What is saved beside the weights."""
        return {}

    @property
    @abstractmethod
    def crop(self) -> tuple[int, int]:
        """(height, width) of the training crops."""

    # -- data

    def check(self, device: torch.device) -> None:
        _ = self.backbone_config

    def open(self) -> None:
        _ = self.train_split, self.val_split

    @cached_property
    def train_split(self) -> DenseSamples:
        """What is trained on."""
        return self.open_split("train")

    @cached_property
    def val_split(self) -> DenseSamples:
        """What is evaluated on."""
        return self.open_split("val")

    @property
    def samples(self) -> int:
        return len(self.train_split)

    @property
    def sha256(self) -> str:
        return self.train_split.sha256

    def order(self, world_size: int) -> SampleOrder:
        train = self.config.train
        return dense_order(
            self.train_split,
            batch_size=train.batch_size,
            world_size=world_size,
            accumulation_steps=train.accumulation_steps,
            seed=train.seed,
        )

    def loader(
        self,
        *,
        rank: int,
        world_size: int,
        place: Place,
        device: torch.device,
        tell: Callable[[BadSample], None],
    ) -> Loader:
        return build_dense_loader(
            self.train_split,
            self.config.data,  # type: ignore[attr-defined]
            self.order(world_size),
            rank=rank,
            place=place,
            device=device,
            tell=tell,
        )

    # -- model

    @property
    def weights(self) -> Path | None:
        """The file that ``backbone.weights`` means; None begins with initial weights.

        Raises:
            UserError: if it is not set, or a run's folder without a checkpoint.
        """
        said = self.config.backbone.weights
        if not said:
            raise UserError(
                "--backbone.weights is not set; name a pre-training run's folder or a file of weights, or "
                f'"{FROM_SCRATCH}" to begin with initial weights'
            )
        if said == FROM_SCRATCH:
            return None
        path = Path(said)
        if not path.is_dir():
            return path
        if (path / WEIGHTS).is_file():
            return path / WEIGHTS
        checkpoint = latest_checkpoint(path)
        if checkpoint is None:
            raise UserError(f"--backbone.weights {said}: the folder holds no checkpoint; name a run that has one")
        return checkpoint / WEIGHTS

    @cached_property
    def backbone_config(self) -> BackboneConfig:
        """The shape of the backbone."""
        with torch.device("meta"):
            return self._backbone().config

    def _backbone(self) -> Backbone:
        said = self.config.backbone
        name = None if said.name == FROM_WEIGHTS else said.name
        fields: dict[str, Any] = {
            key: value[0] if len(value) == 1 else value
            for key, value in (
                ("image_size", said.image_size),
                ("window_size", said.window_size),
                ("use_shift", said.use_shift),
            )
            if value is not None
        }
        options = backbone_options(self.head)
        return create_backbone(name, weights=self.weights, drop_path_rate=said.drop_path_rate, **options, **fields)

    def make_task(self, device: torch.device | None, backend: Backend) -> DenseTask:
        train, config = self.config.train, self.backbone_config
        self.config.check_stages(config.encoder, config.depths)
        backbone = self._backbone()
        task = make_task(backbone, self.head).to(device)
        backbone.set_backend(backend)
        backbone.set_attention(train.attention)
        use_norm(task, train.norm)
        use_float8(backbone, train.float8)
        backbone.set_activation_checkpointing(train.activation_checkpointing)
        return task

    def model(self, task: DenseTask) -> nn.Module:
        return task

    def save(self, state: dict[str, Tensor], path: Path) -> None:
        save_finetuned(state, path, self.backbone_config, self.head, self.notes())

    def meta_batch(self) -> dict[str, Tensor]:
        return self._batch(self.config.train.batch_size)

    def _batch(self, size: int) -> dict[str, Tensor]:
        with torch.device("meta"):
            batch = {"image": torch.empty(size, 3, *self.crop), "index": torch.empty(size, dtype=torch.int64)}
            return batch | self.target(size, *self.crop)

    def flops_per_image(self, backend: Backend = "torch") -> int:
        with torch.device("meta"):
            task = self.make_task(None, "reference" if backend == "reference" else "torch")
        return task_flops_per_image(task, self._batch)

    def parts(self, task: DenseTask) -> Mapping[str, list[nn.Module]]:
        heads = [child for name, child in task.named_children() if name != "backbone"]
        return {"backbone": [task.backbone], "heads": heads}

    def described(self) -> str:
        return f"{self.backbone_config.encoder} backbone, {self.kind}"

    def summary(self) -> str:
        return f"{self.described()}; {self.train_split.describe()}; {self.val_split.describe()}"

    # -- optimization

    def parameter_groups(self, task: nn.Module) -> list[dict[str, Any]]:
        optimizer = self.config.optimizer
        return layer_decay_groups(task, optimizer.weight_decay, optimizer.layer_decay)

    def epochs(self) -> int:
        return self.config.schedule.epochs

    def learning_rate(self, step: int, order: SampleOrder) -> float:
        schedule, peak = self.config.schedule, self.config.optimizer.lr
        if schedule.kind == "triangle":
            return triangle_rate(
                step, order.steps_per_epoch, schedule.epochs, schedule.min_lr, peak, power=schedule.power
            )
        total = order.steps_per_epoch * schedule.epochs
        return poly_rate(
            step, total, peak, warmup_steps=schedule.warmup_steps, power=schedule.power, floor=schedule.min_lr
        )

    # -- evaluation

    def evaluates_after(self, step: int, total: int, order: SampleOrder) -> bool:
        every = self.config.evaluate_every * order.steps_per_epoch
        return step == total or (every > 0 and step % every == 0)

    def evaluate(
        self, task: nn.Module, device: torch.device, beat: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Mapping[str, float] | None:
        """Figures over the images of "val", of which every rank takes its share."""
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        counts, count = self.counts(device), len(self.val_split)
        # Under ZeRO-3 weights are gathered together: every rank predicts as often as the first, if need be in vain.
        mine = range(rank, -(-count // world_size) * world_size, world_size)
        was_training = task.training
        task.eval()
        try:
            samples = evaluation_samples(self.val_split, (index % count for index in mine))
            for done, (index, sample) in enumerate(zip(mine, samples, strict=True)):
                beat(f"evaluating image {done + 1} of {len(mine)}")
                if stopped():
                    return None
                counts.count(task, sample, counted=index < count)
        finally:
            task.train(was_training)
        distributed.all_reduce(counts.state)
        return counts.compute()
