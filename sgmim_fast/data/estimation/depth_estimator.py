"""A pretrained monocular depth estimator of ``transformers``: opening it, and predicting maps with it.

``transformers`` is needed only where an estimator is opened (extra ``maps``). Weights come from
safetensors files alone and no code of a model's author is run.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from sgmim_fast.errors import UserError, first_line
from sgmim_fast.library_noise import without_torchao_complaints

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS = {"nearer": "larger is nearer", "farther": "larger is farther"}
UNKNOWN = "unknown"
MAXIMUM = 65535
# What `predicted_depth` holds: disparity, or depth in metres. Depth Anything's configuration says it itself.
_DIRECTION_OF = {"dpt": "nearer", "depth_pro": "nearer", "glpn": "farther", "zoedepth": "farther"}
_DIRECTION_OF_TYPE = {"relative": "nearer", "metric": "farther"}
_ROUNDING = 1e-6  # relative; upsampling one value everywhere leaves so much in float32
_FOLDER_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "*.safetensors")


@dataclass(frozen=True, kw_only=True)
class DepthEstimator:
    """An estimator without its weights, which ``load`` reads: what is already done needs none."""

    name: str
    """Hub name or folder, as given."""
    commit: str | None
    """Commit of the hub; None for a folder."""
    sha256: str | None
    """Fingerprint of the folder's configuration and weights; None for a model of the hub."""
    kind: str
    """``model_type`` of its configuration, such as "dpt"."""
    direction: str
    """"larger is nearer", "larger is farther" or "unknown"."""
    processor: Any
    device: torch.device
    dtype: str

    @property
    def identity(self) -> str:
        """Short fingerprint of all that the maps' values depend on; the same wherever the folder lies."""
        source = self.sha256 or f"{self.name}@{self.commit}"
        return hashlib.sha256(f"{source} {self.dtype}".encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Facts about the estimator, ready for JSON."""
        import transformers

        size = getattr(self.processor, "size", None)
        return {
            "estimator": self.identity,
            "model": self.name,
            "commit": self.commit,
            "sha256": self.sha256,
            "model_type": self.kind,
            "dtype": self.dtype,
            "processor": type(self.processor).__name__,
            "processor_size": {key: int(value) for key, value in dict(size).items()} if size else None,
            "keep_aspect_ratio": bool(getattr(self.processor, "keep_aspect_ratio", False)),
            "direction": self.direction,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """An 8-bit RGB image as the model's input: (1, 3, h, w) float32 on the CPU, resized and normalised."""
        pixels: torch.Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"]
        return pixels

    def load(self) -> nn.Module:
        """The model with its weights, in evaluation mode, on the device.

        Raises:
            UserError: if it is no depth model, has no safetensors weights, or lacks some that its output depends on.
        """
        with _quiet_library():
            from transformers import AutoModelForDepthEstimation

            try:
                model, report = AutoModelForDepthEstimation.from_pretrained(
                    self.name, **_source(self.name, self.commit), use_safetensors=True, output_loading_info=True
                )
            except Exception as error:  # another library's reader of another author's files: it raises all kinds
                raise _unusable(self.name, error) from error
        self._refuse_untrained(model, report["missing_keys"])
        loaded: nn.Module = model.requires_grad_(False).to(device=self.device, dtype=DTYPES[self.dtype]).eval()
        return loaded

    def _refuse_untrained(self, model: nn.Module, missing: Sequence[str]) -> None:
        """The library starts missing weights at random. Some published models lack weights that nothing reads, so
        they are made NaN and a forward pass tells whether the prediction depends on them."""
        tensors = model.state_dict(keep_vars=False)
        lost = sorted(name for name in missing if name in tensors and tensors[name].is_floating_point())
        if not lost:
            return
        for name in lost:
            tensors[name].fill_(torch.nan)
        with torch.inference_mode():
            probe = self.prepare(Image.new("RGB", (64, 64), (128, 96, 64)))
            prediction = model.eval()(pixel_values=probe.to(next(model.parameters()).dtype)).predicted_depth
        if not prediction.isfinite().all():
            raise UserError(
                f"{self.name} was not trained for depth: it lacks {len(lost)} weights, {lost[0]} among them; "
                "choose a depth estimation model"
            )

    @torch.inference_mode()
    def predict(
        self, model: nn.Module, pixels: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[torch.Tensor]:
        """One forward pass, upsampled bilinearly to the images' sizes.

        Args:
            model: from ``load``.
            pixels: inputs of ``prepare``, all of one shape.
            sizes: (H, W) of each image in pixels.

        Returns:
            For each image (H, W) float32 on the device, in the model's own unit.
        """
        batch = torch.cat(list(pixels)).to(device=self.device, dtype=DTYPES[self.dtype])
        try:
            predicted = model(pixel_values=batch).predicted_depth.float()
            return [
                functional.interpolate(one[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
                for one, size in zip(predicted, sizes, strict=True)
            ]
        except torch.OutOfMemoryError as error:
            raise UserError(f"--batch-size {len(batch)} does not fit the GPU's memory; give a smaller one") from error


@torch.inference_mode()
def scale_to_16_bits(prediction: torch.Tensor) -> tuple[np.ndarray, float, float]:
    """Stretch a prediction to the whole range of 16 bits.

    Args:
        prediction: (H, W) float32.

    Returns:
        (H, W) uint16 = round(65535 * (prediction - minimum) / (maximum - minimum)), minimum, maximum.

    Raises:
        UserError: if there is nothing to stretch: one value everywhere, or a value that is not finite.
    """
    low, high = prediction.aminmax()
    span = high - low
    minimum, maximum, width = torch.stack((low, high, span)).tolist()
    if not np.isfinite(width):  # one NaN or infinity makes the span one
        raise UserError("the prediction is not finite")
    if width <= _ROUNDING * max(abs(minimum), abs(maximum)):
        raise UserError("the prediction is the same everywhere")
    scaled = ((prediction - low) / span * MAXIMUM).round().to(torch.int32)
    return scaled.cpu().numpy().astype(np.uint16), minimum, maximum


def open_estimator(
    model: str, *, dtype: str = "auto", device: str | None = None, direction: str | None = None
) -> DepthEstimator:
    """Find a depth estimator and read its configuration and image processor, not yet its weights.

    Args:
        model: name on the Hugging Face hub, or a folder written by ``save_pretrained``.
        dtype: "fp32", "bf16", "fp16", or "auto": bf16 on CUDA, else fp32.
        device: as PyTorch names it; None for CUDA where there is a GPU, else the CPU.
        direction: "nearer" or "farther", what a larger value means; None to take it from the configuration.

    Raises:
        UserError: if transformers is not installed, the model is not found, no depth model, or pads or crops images.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {dtype} is unknown; choose auto, {', '.join(DTYPES)}")
    if direction is not None and direction not in DIRECTIONS:
        raise UserError(f"--direction {direction} is unknown; choose {' or '.join(DIRECTIONS)}")
    try:
        with without_torchao_complaints():
            from transformers import AutoConfig, AutoImageProcessor, AutoModelForDepthEstimation
    except ImportError as error:
        raise UserError("structure maps need transformers; run pip install 'sgmim-fast[maps]'") from error
    if not Path(model).is_dir() and (not model or model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise UserError(f"--model {model} is no folder; give a model's folder or its name on the Hugging Face hub")
    with _quiet_library():
        try:
            config = AutoConfig.from_pretrained(model, **_source(model, None))
            commit = getattr(config, "_commit_hash", None)
            if type(config) not in AutoModelForDepthEstimation._model_mapping:
                raise UserError(f"--model {model} is no depth estimation model but of the kind {config.model_type!r}")
            processor = AutoImageProcessor.from_pretrained(model, **_source(model, commit))
        except UserError:
            raise
        except Exception as error:  # as in load
            raise _unusable(model, error) from error
    classes = getattr(config, "architectures", None) or []
    if classes and not any(name.endswith("ForDepthEstimation") for name in classes):
        raise UserError(f"--model {model} is no depth estimation model but a {classes[0]}")
    if getattr(processor, "do_pad", None) or getattr(processor, "do_center_crop", None):
        raise UserError(
            f"--model {model} pads or crops images, so its maps would not lie on them; choose another model, such as "
            "Depth Anything V2 or DPT"
        )
    place = _device(device)
    return DepthEstimator(
        name=model,
        commit=commit,
        sha256=_fingerprint(Path(model)) if Path(model).is_dir() else None,
        kind=str(config.model_type),
        direction=DIRECTIONS[direction] if direction else _known_direction(config),
        processor=processor,
        device=place,
        dtype=("bf16" if place.type == "cuda" else "fp32") if dtype == "auto" else dtype,
    )


def _known_direction(config: Any) -> str:
    if config.model_type == "depth_anything":
        word = _DIRECTION_OF_TYPE.get(str(config.depth_estimation_type))
    else:
        word = _DIRECTION_OF.get(str(config.model_type))
    return DIRECTIONS[word] if word else UNKNOWN


def _device(wanted: str | None) -> torch.device:
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {wanted} is unknown; give cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise UserError(f"--device {device}: PyTorch sees {torch.cuda.device_count()} GPUs here; choose another device")
    return device


def _source(model: str, commit: str | None) -> dict[str, Any]:
    """Where the library is to look; a folder is never a reason to ask the hub."""
    here = Path(model).is_dir()
    return {"trust_remote_code": False, "local_files_only": here, **({"revision": commit} if commit else {})}


def _unusable(model: str, error: Exception) -> UserError:
    if Path(model).is_dir():
        return UserError(
            f"--model {model} cannot be used ({first_line(error)}); give a folder with config.json, "
            "preprocessor_config.json and safetensors weights of a depth estimation model"
        )
    return UserError(
        f"--model {model} is no folder here and cannot be had from the Hugging Face hub ({first_line(error)}); "
        "check the name and the network, or give a folder"
    )


def _fingerprint(folder: Path) -> str:
    """SHA-256 over the files that the maps depend on; moved or renamed, the folder keeps it."""
    digests = {}
    for pattern in _FOLDER_FILES:
        for path in folder.glob(pattern):
            with open(path, "rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Neither messages nor progress bars of the libraries; what matters is said by our own errors."""
    from transformers.utils import logging as library

    hub = logging.getLogger("huggingface_hub")
    levels, bars = (library.get_verbosity(), hub.level), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        with without_torchao_complaints():
            yield
    finally:
        library.set_verbosity(levels[0])
        hub.setLevel(levels[1])
        if bars:
            library.enable_progress_bar()
