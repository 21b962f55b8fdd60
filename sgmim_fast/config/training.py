"""How a run is executed, watched, and what it survives. Durations are in optimizer steps or seconds, as named."""

from dataclasses import dataclass
from typing import Literal, get_args

from sgmim_fast.config.checks import one_of, require

Backend = Literal["auto", "reference", "torch", "triton"]
Attention = Literal["auto", "sdpa", "xformers"]
Norm = Literal["torch", "apex"]
Float8 = Literal["off", "tensorwise", "rowwise", "rowwise_with_gw_hp"]


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
    float8: Float8 = "off"
    """Multiply the encoder's matrices in FP8, by a recipe of torchao: one scale a tensor ("tensorwise", fastest), a row
    ("rowwise"), or a row with weights' gradients in bf16 ("rowwise_with_gw_hp", most exact). bf16; GPUs from 8.9 on."""
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
    async_checkpoint: bool = False
    """Write checkpoints beside the training, from a copy in the host's memory; "latest" still waits for the disk."""
    activation_checkpointing: tuple[int, ...] = ()
    """Encoder stages (from 0; ViT has stage 0 alone) whose blocks keep no activations but compute them again."""
    offload_optimizer: bool = False
    """Keep the optimizer's state, and take its steps, in the host's memory (ZeRO 1 to 3)."""
    overlap_comm: Literal["auto", "on", "off"] = "auto"
    """Reduce gradients beside the backward pass (DeepSpeed's overlap_comm; ZeRO 1 to 3); "auto" does so at stage 3."""
    bucket_size: int = 500_000_000
    """Gradient elements that one collective takes at a time; smaller ones need less memory (ZeRO 1 to 3)."""

    def __post_init__(self) -> None:
        one_of("train.precision", self.precision, ("fp32", "bf16"))
        one_of("train.backend", self.backend, get_args(Backend))
        one_of("train.attention", self.attention, get_args(Attention))
        one_of("train.norm", self.norm, get_args(Norm))
        one_of("train.overlap_comm", self.overlap_comm, ("auto", "on", "off"))
        one_of("train.float8", self.float8, get_args(Float8))
        for name in ("batch_size", "accumulation_steps", "log_every", "checkpoint_every", "keep_last", "bucket_size"):
            require(getattr(self, name) >= 1, f"train.{name} {getattr(self, name)} must be 1 or more")
        for name in ("keep_every", "max_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name} {value} must be 1 or more")
        require(self.seed >= 0, f"train.seed {self.seed} must be 0 or more")
        require(self.zero_stage in (0, 1, 2, 3), f"train.zero_stage {self.zero_stage} must be 0, 1, 2 or 3")
        require(
            self.precision != "bf16" or self.zero_stage >= 1,
            "train.precision bf16 needs train.zero_stage 1 or more: DeepSpeed's stage 0 takes a wrong first Adam "
            "step in bf16",
        )
        stages = self.activation_checkpointing
        require(
            all(stage >= 0 for stage in stages) and len(set(stages)) == len(stages),
            f"train.activation_checkpointing {' '.join(map(str, stages))} must name stages from 0, each once",
        )
        require(
            self.zero_stage >= 1 or not (self.offload_optimizer or self.overlap_comm == "on"),
            "train.offload_optimizer and train.overlap_comm need train.zero_stage 1 or more",
        )
        require(
            self.float8 == "off" or self.precision == "bf16",
            f"train.float8 {self.float8} is for train.precision bf16: what is not FP8 is bf16; choose both, or neither",
        )
        require(
            self.attention == "auto" or self.backend != "reference",
            f'train.attention {self.attention} cannot replace what train.backend "reference" computes; choose backend '
            '"torch" or "triton"',
        )
        require(
            not self.compile or self.zero_stage < 3,
            "--compile cannot make one graph of train.zero_stage 3, where DeepSpeed fetches the weights of each module "
            "in a hook of its own; use stage 2 or less, or leave --compile out",
        )
        require(
            not self.compile or self.attention != "xformers",
            "train.attention xformers cannot be compiled in one piece; use sdpa, which has the same kernels, or leave "
            "--compile out",
        )
        require(
            not self.compile or self.norm != "apex",
            "train.norm apex cannot be compiled; use torch, whose norms the compiler fuses, or leave --compile out",
        )

    @property
    def overlaps_comm(self) -> bool:
        """What ``overlap_comm`` comes to at this ZeRO stage."""
        return self.zero_stage == 3 if self.overlap_comm == "auto" else self.overlap_comm == "on"


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """When a run is given up, so that nothing hangs and nothing wrong goes on."""

    collective_timeout: float = 600.0
    """Seconds that ranks wait for each other, in whatever they do together, before the run ends."""
    stall_timeout: float = 900.0
    """Seconds without a finished step, a checkpoint or the first batch, after which a rank writes where it hangs and
    ends. Compiling counts."""
    max_skipped_steps: int = 10
    """Steps in a row with a gradient that is not finite, which are skipped, before the run ends."""

    def __post_init__(self) -> None:
        require(self.collective_timeout > 0, f"fault.collective_timeout {self.collective_timeout} must be positive")
        require(self.stall_timeout > 0, f"fault.stall_timeout {self.stall_timeout} must be positive")
        require(self.max_skipped_steps >= 0, f"fault.max_skipped_steps {self.max_skipped_steps} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is told about a run beside metrics.jsonl and TensorBoard."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: "offline" writes files to RUN/wandb for `wandb sync`, "online" sends while training."""
    wandb_project: str = "sgmim-fast"
    """Project of Weights & Biases that the run belongs to."""
    profile_steps: tuple[int, ...] = ()
    """Optimizer steps (from 1) of which each rank writes a trace of PyTorch's profiler to RUN/profile."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, for the model FLOPs utilisation; known for common GPUs."""

    def __post_init__(self) -> None:
        one_of("monitor.wandb", self.wandb, ("off", "offline", "online"))
        require(
            all(step >= 1 for step in self.profile_steps),
            f"monitor.profile_steps {' '.join(map(str, self.profile_steps))} must be 1 or more each",
        )
        require(
            self.peak_tflops is None or self.peak_tflops > 0, f"monitor.peak_tflops {self.peak_tflops} must be positive"
        )
