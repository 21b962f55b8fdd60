"""Configuration: keyword-only dataclasses that validate themselves.

Sizes are in pixels, learning rates are per 512 images of total batch, durations in epochs unless a
name says steps. Sources: SG-MIM (arXiv 2409.02513), SimMIM (2111.09886), Swin V2 (2111.09883).
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from sgmim_fast.errors import UserError
from sgmim_fast.masking import CELL, masked_cell_count

Encoder = Literal["swin", "swinv2", "vit"]
Guidance = Literal["relational", "relational-visible", "none"]
Backend = Literal["auto", "reference", "torch", "triton"]
Attention = Literal["auto", "sdpa", "xformers"]
Norm = Literal["torch", "apex"]
OptimizerName = Literal["adamw", "apex", "deepspeed"]
Loader = Literal["auto", "torch", "dali"]
GUIDANCE_HEADS = 8  # fixed by the method


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of an SG-MIM (or, with ``guidance="none"``, a SimMIM) pre-training model.

    Raises:
        UserError: for any combination that cannot be built; the message names the field.
    """

    encoder: Encoder = "swin"
    """Swin, Swin V2 (cosine attention) or ViT (shared relative position bias)."""
    image_size: int | tuple[int, int] = 192
    """Side, or (height, width); multiples of 32."""
    patch_size: int = None  # type: ignore[assignment]
    """Pixels a patch side; unless given, 4 for Swin and 16 for ViT."""
    embed_dim: int = 128
    """Channels of the first stage (Swin) or of every block (ViT)."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks a stage; one entry for ViT."""
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads a stage; one entry for ViT."""
    window_size: int = 6
    """Tokens a window side (Swin); reduced where it covers the whole map. ViT ignores it."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; earlier ones less, linearly."""
    layer_scale_init: float | None = None
    """Initial layer scale of ViT blocks; None for none. Swin has none."""
    norm_eps: float = None  # type: ignore[assignment]
    """Epsilon of the encoder's LayerNorms; unless given, 1e-5 for Swin and 1e-6 for ViT."""
    guidance: Guidance = "relational"
    """How image features ask structure features; "none" is SimMIM, "relational-visible" leaves hidden context out."""
    structure_channels: int = 1
    """Channels of the structure map: 1 for depth, 3 for surface normals."""
    structure_loss_weight: float = 1.0
    """Weight of the structure loss beside the image loss."""
    normalize_target_window: int | None = None
    """Side of the window whose mean and variance normalise the image target; None for plain pixels."""

    def __post_init__(self) -> None:
        _one_of("encoder", self.encoder, ("swin", "swinv2", "vit"))
        _one_of("guidance", self.guidance, ("relational", "relational-visible", "none"))
        vit = self.encoder == "vit"
        for name in ("depths", "num_heads"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, int) else tuple(value))
        if self.patch_size is None:
            object.__setattr__(self, "patch_size", 16 if vit else 4)
        if self.norm_eps is None:
            object.__setattr__(self, "norm_eps", 1e-6 if vit else 1e-5)
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        self._check_sizes()
        self._check_widths()
        _require(0.0 <= self.drop_path_rate < 1.0, f"drop_path_rate {self.drop_path_rate} must be in [0, 1)")
        _require(self.layer_scale_init is None or vit, "layer_scale_init is for the ViT encoder; leave it out for Swin")
        _require(self.norm_eps > 0, f"norm_eps {self.norm_eps} must be positive")
        _require(self.structure_channels >= 1, f"structure_channels {self.structure_channels} must be 1 or more")
        _require(self.structure_loss_weight >= 0, f"structure_loss_weight {self.structure_loss_weight} is negative")
        window = self.normalize_target_window
        _require(
            window is None or (window >= 3 and window % 2 == 1),
            f"normalize_target_window {window} must be odd and 3 or more (SimMIM uses 47)",
        )

    def _check_sizes(self) -> None:
        stages = len(self.depths)
        _require(self.encoder != "vit" or stages == 1, f"depths {self.depths} must have one entry for ViT")
        _require(
            len(self.hw) == 2 and all(side > 0 and side % CELL == 0 for side in self.hw),
            f"image_size {self.image_size} must be a multiple of {CELL} on each side",
        )
        _require(
            self.grid[0] * self.grid[1] >= 2,
            f"image_size {self.image_size} holds one {CELL}-pixel cell; masking needs at least two",
        )
        _require(
            self.stride in (4, 8, 16, 32),
            f"patch_size {self.patch_size} with {len(self.depths)} stage(s) gives an encoder stride of "
            f"{self.stride}; it must be 4, 8, 16 or 32 to fit the {CELL}-pixel mask cells",
        )
        _require(self.window_size >= 1, f"window_size {self.window_size} must be 1 or more")

    def _check_widths(self) -> None:
        _require(
            len(self.depths) == len(self.num_heads) > 0,
            f"depths {self.depths} and num_heads {self.num_heads} must have one entry a stage",
        )
        _require(all(depth >= 1 for depth in self.depths), f"depths {self.depths} must be 1 or more each")
        for stage, heads in enumerate(self.num_heads):
            width = self.embed_dim * 2**stage
            _require(
                heads >= 1 and width % heads == 0,
                f"num_heads {heads} of stage {stage} does not divide its {width} channels",
            )
        if self.guidance != "none":
            _require(
                self.num_features % GUIDANCE_HEADS == 0,
                f"embed_dim {self.embed_dim} gives {self.num_features} encoder channels; guidance needs a "
                f"multiple of {GUIDANCE_HEADS}",
            )
            _require(
                self.num_features % 2**self.structure_merges == 0,
                f"embed_dim {self.embed_dim} gives {self.num_features} encoder channels, which "
                f"{self.structure_merges} patch mergings of the structure encoder cannot reach by doubling",
            )

    @property
    def hw(self) -> tuple[int, int]:
        """Image (height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Mask cells (rows, columns)."""
        return self.hw[0] // CELL, self.hw[1] // CELL

    @property
    def stride(self) -> int:
        """Pixels an encoder token covers a side: 32 for four-stage Swin, the patch size for ViT."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def num_features(self) -> int:
        """Channels of the encoder's tokens."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @property
    def structure_merges(self) -> int:
        """Patch-merging layers of the structure encoder: log2(stride / 4)."""
        return self.stride.bit_length() - 3


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pairs are, and how one is cropped and masked."""

    path: str = ""
    """Folder with images/ and structure/ paired by file stem, or a list file of pairs."""
    mask_ratio: float = 0.6
    """Share of the 32-pixel cells that are masked, rounded up."""
    crop_scale: tuple[float, float] = (0.67, 1.0)
    """Share of the image's area that a random crop keeps."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a random crop."""
    flip: bool = True
    """Mirror half of the pairs left to right."""
    workers: int = 4
    """Loader processes a rank (torch; 0 loads in the training process) or decoding threads a rank (dali)."""
    loader: Loader = "auto"
    """Who decodes: PyTorch's DataLoader with Pillow ("torch"), NVIDIA "dali", or dali where it can ("auto")."""
    decode_on: Literal["auto", "cpu", "gpu"] = "auto"
    """Where dali decodes images and resizes: on the training's GPU if there is one ("auto"), "cpu" or "gpu"."""
    max_bad_share: float = 0.01
    """Share of the pairs that may turn out unreadable during a run; others stand in for them. 0 stops at the first."""
    shuffle_buffer: int = 0
    """With shards: samples that are mixed at a time, so that each shard is read in one go; 0 mixes all."""

    def __post_init__(self) -> None:
        masked_cell_count(1 << 20, self.mask_ratio)
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, f"data.crop_scale {self.crop_scale} must satisfy 0 < low <= high <= 1")
        low, high = self.crop_ratio
        _require(0 < low <= high, f"data.crop_ratio {self.crop_ratio} must satisfy 0 < low <= high")
        _require(self.workers >= 0, f"data.workers {self.workers} must be 0 or more")
        _one_of("data.loader", self.loader, get_args(Loader))
        _one_of("data.decode_on", self.decode_on, ("auto", "cpu", "gpu"))
        _require(0 <= self.max_bad_share < 1, f"data.max_bad_share {self.max_bad_share} must be in [0, 1)")
        _require(self.shuffle_buffer >= 0, f"data.shuffle_buffer {self.shuffle_buffer} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, with learning rates as for a total batch of 512."""

    implementation: OptimizerName = "adamw"
    """Whose AdamW: PyTorch's fused "adamw", or the FusedAdam of NVIDIA "apex" or "deepspeed", which need CUDA."""
    lr: float = 1e-4
    """Peak learning rate for 512 images a step; the real one scales with the total batch."""
    weight_decay: float = 0.05
    """On matrices only; norms, biases, bias tables, tokens and logit scales have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    clip_grad_norm: float = 5.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self) -> None:
        _one_of("optimizer.implementation", self.implementation, get_args(OptimizerName))
        _require(self.lr > 0, f"optimizer.lr {self.lr} must be positive")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay {self.weight_decay} must be 0 or more")
        _require(all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas {self.betas} must be in [0, 1)")
        _require(self.clip_grad_norm > 0, f"optimizer.clip_grad_norm {self.clip_grad_norm} must be positive")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine or steps; evaluated at every optimizer step."""

    kind: Literal["cosine", "multistep"] = "cosine"
    """Shape after the warm-up."""
    epochs: int = 100
    """Length of the whole schedule."""
    warmup_epochs: float = 10.0
    """Length of the linear warm-up."""
    warmup_lr: float = 1e-6
    """Where the warm-up begins."""
    min_lr: float = 1e-5
    """Where the cosine ends."""
    milestones: tuple[float, ...] = ()
    """Epochs at which the rate is multiplied by gamma (multistep)."""
    gamma: float = 0.1
    """Factor at each milestone."""

    def __post_init__(self) -> None:
        _one_of("schedule.kind", self.kind, ("cosine", "multistep"))
        _require(self.epochs >= 1, f"schedule.epochs {self.epochs} must be 1 or more")
        _require(
            0 <= self.warmup_epochs <= self.epochs,
            f"schedule.warmup_epochs {self.warmup_epochs} must be between 0 and schedule.epochs {self.epochs}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the run is executed."""

    batch_size: int = 128
    """Pairs a rank and micro-step."""
    accumulation_steps: int = 1
    """Micro-steps an optimizer step."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of weights and activations; optimizer state is fp32 either way."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage; bf16 needs 1 or more."""
    backend: Backend = "auto"
    """Implementation of the method: the plain "reference", "torch", "triton", or "auto" by device."""
    attention: Attention = "auto"
    """The backend's own ("auto"), PyTorch's scaled_dot_product_attention ("sdpa") or "xformers" (CUDA)."""
    norm: Norm = "torch"
    """LayerNorm of PyTorch ("torch") or NVIDIA's "apex" FusedLayerNorm (CUDA)."""
    compile: bool = False
    """Compile the whole step with torch.compile, which takes its time first; drop path then draws other numbers."""
    seed: int = 0
    """Decides initial weights, sample order, crops and masks."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; the schedule still spans all epochs."""
    log_every: int = 20
    """Optimizer steps between metric rows; the device is waited for only there."""
    checkpoint_every: int = 1000
    """Optimizer steps between checkpoints; one is always written at the end."""
    keep_last: int = 3
    """Newest checkpoints to keep; older ones are removed once a newer one is whole."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this."""

    def __post_init__(self) -> None:
        _one_of("train.precision", self.precision, ("fp32", "bf16"))
        _one_of("train.backend", self.backend, get_args(Backend))
        _one_of("train.attention", self.attention, get_args(Attention))
        _one_of("train.norm", self.norm, get_args(Norm))
        for name in ("batch_size", "accumulation_steps", "log_every", "checkpoint_every", "keep_last"):
            _require(getattr(self, name) >= 1, f"train.{name} {getattr(self, name)} must be 1 or more")
        for name in ("keep_every", "max_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name} {value} must be 1 or more")
        _require(self.seed >= 0, f"train.seed {self.seed} must be 0 or more")
        _require(self.zero_stage in (0, 1, 2, 3), f"train.zero_stage {self.zero_stage} must be 0, 1, 2 or 3")
        _require(
            self.precision != "bf16" or self.zero_stage >= 1,
            "train.precision bf16 needs train.zero_stage 1 or more: DeepSpeed's stage 0 takes a wrong first Adam "
            "step in bf16",
        )
        _require(
            self.attention == "auto" or self.backend != "reference",
            f'train.attention {self.attention} cannot replace what train.backend "reference" computes; choose backend '
            '"torch" or "triton"',
        )
        _require(
            not self.compile or self.zero_stage < 3,
            "--compile cannot make one graph of train.zero_stage 3, where DeepSpeed fetches the weights of each module "
            "in a hook of its own; use stage 2 or less, or leave --compile out",
        )
        _require(
            not self.compile or self.attention != "xformers",
            "train.attention xformers cannot be compiled in one piece; use sdpa, which has the same kernels, or leave "
            "--compile out",
        )
        _require(
            not self.compile or self.norm != "apex",
            "train.norm apex cannot be compiled; use torch, whose norms the compiler fuses, or leave --compile out",
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pre-training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: str = "runs/pretrain"
    """Folder of the run: configuration, metrics, TensorBoard files, checkpoints."""
    resume: str = "none"
    """Go on from the output folder's newest intact checkpoint ("auto"; without one, begin anew) or from a path."""
    allow_changes: tuple[str, ...] = ()
    """Settings that may differ from the checkpoint's though they change the result, such as optimizer.lr."""

    def __post_init__(self) -> None:
        rows, columns = self.model.grid
        masked_cell_count(rows * columns, self.data.mask_ratio)
        _require(
            self.optimizer.implementation != "apex" or self.train.zero_stage < 3,
            "optimizer.implementation apex counts one step for each piece that train.zero_stage 3 hands it; choose "
            "adamw or deepspeed, or a lower stage",
        )
