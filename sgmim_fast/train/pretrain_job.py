"""Pre-training, as the engine runs it."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from sgmim_fast.config import Backend, PretrainConfig
from sgmim_fast.data.batches import Loader
from sgmim_fast.data.dali_decoding import import_dali
from sgmim_fast.data.loading import build_loader, choose_loader, sample_order
from sgmim_fast.data.members import Pairs
from sgmim_fast.data.order import Place, SampleOrder
from sgmim_fast.data.sources import open_pairs
from sgmim_fast.data.substitution import BadSample
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.tasks.pretrain import PretrainTask
from sgmim_fast.train.activation_memory import meta_batch
from sgmim_fast.train.flops import training_flops_per_image
from sgmim_fast.train.job import Job
from sgmim_fast.train.optim import learning_rate
from sgmim_fast.weights import save_weights


class PretrainJob(Job[PretrainConfig]):
    """Masked image modelling on pairs of images and structure maps."""

    kind = "pretrain"
    doing = "pre-training"
    losses = ("loss", "image_loss", "structure_loss")
    sources = ("image", "structure")
    fixed = ("model.",)

    def check(self, device: torch.device) -> None:
        if self.config.data.loader == "dali":
            import_dali()

    # -- data

    @cached_property
    def pairs(self) -> Pairs:
        """The data set."""
        return open_pairs(self.config.data.path, structure=self.config.model.guidance != "none")

    def open(self) -> None:
        _ = self.pairs

    @property
    def samples(self) -> int:
        return len(self.pairs)

    @property
    def sha256(self) -> str:
        return self.pairs.sha256

    def order(self, world_size: int) -> SampleOrder:
        return sample_order(self.pairs, self.config, world_size)

    def loader(
        self,
        *,
        rank: int,
        world_size: int,
        place: Place,
        device: torch.device,
        tell: Callable[[BadSample], None],
    ) -> Loader:
        return build_loader(
            self.pairs, self.config, rank=rank, world_size=world_size, place=place, device=device, tell=tell
        )

    # -- model

    def make_task(self, device: torch.device | None, backend: Backend) -> PretrainTask:
        train = self.config.train
        return PretrainTask(
            self.config.model,
            backend,
            train.attention,
            train.norm,
            device,
            train.activation_checkpointing,
            train.float8,
        )

    def model(self, task: PretrainTask) -> SGMIM:
        return task.model

    def save(self, state: dict[str, Tensor], path: Path) -> None:
        with torch.device("meta"):
            twin = SGMIM(self.config.model)
        twin.load_state_dict(state, assign=True)
        save_weights(twin, path, layout="simmim" if self.config.model.guidance == "none" else "sgmim")

    def meta_batch(self) -> dict[str, Tensor]:
        return meta_batch(self.config)

    def flops_per_image(self, backend: Backend = "torch") -> int:
        return training_flops_per_image(self.config.model, backend, self.config.data.mask_ratio)

    def parts(self, task: PretrainTask) -> Mapping[str, list[nn.Module]]:
        found: dict[str, list[nn.Module]] = {"encoder": [], "guidance": [], "heads": []}
        for name, child in task.model.named_children():
            part = "encoder" if name == "encoder" else "heads" if name.endswith("decoder") else "guidance"
            found[part].append(child)
        return found

    def described(self) -> str:
        return f"{self.config.model.encoder} encoder, guidance {self.config.model.guidance}"

    def summary(self) -> str:
        loader, why = choose_loader(self.pairs, self.config)
        return f"{self.described()}; {self.samples} pairs through {loader} ({why})"

    # -- optimization

    def epochs(self) -> int:
        return self.config.schedule.epochs

    def learning_rate(self, step: int, order: SampleOrder) -> float:
        config = self.config
        return learning_rate(step, order.steps_per_epoch, order.step_size, config.optimizer, config.schedule)
