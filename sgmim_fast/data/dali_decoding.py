"""NVIDIA DALI's decoders: the graph of a training batch, and whole pairs for verification.

Files are read by Python threads, which also look at their headers: so a file that is missing, empty, of another size
or of another kind never reaches a pipeline, where it would take its whole batch with it.
"""

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from sgmim_fast.config import PretrainConfig
from sgmim_fast.data import reading
from sgmim_fast.data.augment import IMAGENET_MEAN, IMAGENET_STD
from sgmim_fast.data.decoding import DecodedPair, EncodedPair, check_sizes
from sgmim_fast.data.members import Encoded, Pairs
from sgmim_fast.errors import UserError, first_line

MapKind = Literal["none", "integers", "floats", "arrays"]
"""How maps are stored: pictures of 8 or 16 bits, float32 TIFFs, or .npy. One graph decodes one kind."""

SPOT_CHECKS = 16
"""Maps whose kind is looked at before DALI is chosen."""

STRETCH = 257.0
"""DALI stretches 8 bits to 16 by this."""


def import_dali() -> Any:
    """The modules ``fn``, ``types`` and the class ``Pipeline`` of DALI.

    Raises:
        UserError: if it is not installed, or does not load here.
    """
    try:
        from nvidia.dali import fn, pipeline, types
    except (ImportError, OSError) as error:
        raise UserError(
            f"--data.loader dali: NVIDIA DALI cannot be imported ({first_line(error)}); "
            "pip install 'sgmim-fast[dali]', or use --data.loader torch"
        ) from error
    return fn, types, pipeline.Pipeline


def check_dali() -> None:
    """Decode a picture, which is more than importing.

    Raises:
        UserError: if DALI is not installed or cannot do it.
    """
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    (result,) = DaliDecoder(1).decode([(Encoded("a test picture", picture.getvalue()), None)])
    if isinstance(result, UserError):
        raise result


def map_kind(file: Encoded) -> MapKind:
    """How a map is stored."""
    if reading.is_array(file.name):
        return "arrays"
    return "floats" if reading.value_type(file).kind == "f" else "integers"


def first_kind(pairs: Pairs, channels: int) -> MapKind:
    """How a data set's maps are stored, by the first one that can be read.

    Raises:
        UserError: if none of the first hundred can be read, or DALI cannot decode that kind.
    """
    complaint: UserError | None = None
    for index in range(min(len(pairs), 100)):
        structure = pairs.members(index)[1]
        if structure is None:
            raise ValueError("the data set was opened without structure maps, but the model's guidance needs them")
        try:
            kind = map_kind(structure.read())
        except UserError as error:
            complaint = complaint or error
            continue
        if kind != "arrays" and channels not in (1, 3):
            raise UserError(
                f"--data.loader dali decodes pictures of 1 or 3 channels, not --model.structure-channels {channels}; "
                "save the maps as .npy, or use --data.loader torch"
            )
        return kind
    assert complaint is not None, "a data set has pairs"
    raise complaint


def objection(pairs: Pairs, config: PretrainConfig) -> str:
    """Why DALI cannot serve a run; empty if it can."""
    try:
        import_dali()
        if config.model.guidance != "none":
            kind = first_kind(pairs, config.model.structure_channels)
            for index in range(0, len(pairs), -(-len(pairs) // SPOT_CHECKS)):
                if (structure := pairs.members(index)[1]) is not None:
                    check_kind(structure.read(), kind)
    except UserError as error:
        return str(error)
    return ""


def check_kind(file: Encoded, kind: MapKind) -> None:
    """Refuse a map that is not stored as its data set's first one."""
    if (own := map_kind(file)) != kind:
        raise UserError(
            f"{file.name}: holds {own} where the data set's first map holds {kind}; save all maps in one kind of file, "
            "or use --data.loader torch"
        )


def training_pipeline(
    *,
    batch_size: int,
    threads: int,
    device_id: int | None,
    size: tuple[int, int] | None,
    channels: int,
    kind: MapKind,
    depth: int,
) -> Any:
    """The graph of a training batch, built.

    Inputs, a list of B arrays each: ``image`` (bytes,) uint8; ``start`` and ``shape`` (2,) int32, the box in rows and
    columns; ``structure`` likewise (bytes,) uint8, or, of kind "arrays" and with a size, (h, w, C) float32, cropped
    already; and with a size ``mirror`` () int32, and ``divisor`` () float32 for kind "integers". Outputs, with a size:
    float32 image (B, 3, S_h, S_w), normalised, and, unless kind is "none", float32 structure (B, C, S_h, S_w), stored
    values; without: the crops as stored, (h, w, 3) uint8 and (h, w, C) uint16 or float32.

    Args:
        device_id: GPU that decodes images and resizes; None does everything on the CPU.
        size: (S_h, S_w); None leaves resizing, flipping and normalising to others.
        depth: batches in work at a time.
    """
    fn, types, pipeline = import_dali()
    built = pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=depth, seed=0
    )
    with built:
        start, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape"))
        image = fn.decoders.image_slice(
            fn.external_source(name="image", dtype=types.UINT8, ndim=1),
            start=start,
            shape=shape,
            axes=(0, 1),
            device="cpu" if device_id is None else "mixed",
            output_type=types.RGB,
            adjust_orientation=False,
        )
        outputs = [image]
        if kind != "none" and not (kind == "arrays" and size is None):
            outputs.append(_structure(fn, types, kind, channels, start, shape))
        if size is not None:
            outputs = _finished(fn, types, kind, size, outputs, device_id is not None)
        built.set_outputs(*outputs)
    built.build()
    return built


def _finished(fn: Any, types: Any, kind: MapKind, size: tuple[int, int], crops: list[Any], on_gpu: bool) -> list[Any]:
    """Resized, mirrored, normalised."""
    mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
    image = fn.crop_mirror_normalize(
        fn.resize(crops[0], size=size, interp_type=types.INTERP_LINEAR, antialias=True),
        mirror=mirror,
        mean=[255 * mean for mean in IMAGENET_MEAN],
        std=[255 * std for std in IMAGENET_STD],
        dtype=types.FLOAT,
        output_layout="CHW",
    )
    if kind == "none":
        return [image]
    structure = crops[1].gpu() if on_gpu else crops[1]
    # Antialiasing would average depths across edges into depths that nothing in the scene has.
    structure = fn.resize(structure, size=size, interp_type=types.INTERP_LINEAR, antialias=False, dtype=types.FLOAT)
    if kind == "integers":
        structure = structure / fn.external_source(name="divisor", dtype=types.FLOAT, ndim=0)
    return [image, fn.crop_mirror_normalize(structure, mirror=mirror, mean=0.0, std=1.0, output_layout="CHW")]


def _structure(fn: Any, types: Any, kind: MapKind, channels: int, start: Any, shape: Any) -> Any:
    """The cropped map as stored, (h, w, C); 8 bits are stretched to 16."""
    if kind == "arrays":
        return fn.external_source(name="structure", dtype=types.FLOAT, ndim=3, layout="HWC")
    return fn.decoders.image_slice(
        fn.external_source(name="structure", dtype=types.UINT8, ndim=1),
        start=start,
        shape=shape,
        axes=(0, 1),
        # Decoding grey JPEG without naming the colours corrupts memory (DALI 2.4).
        output_type=types.GRAY if channels == 1 else types.RGB,
        dtype=types.FLOAT if kind == "floats" else types.UINT16,
        adjust_orientation=False,
    )


class DaliDecoder:
    """What the DALI loader decodes with, on the CPU, for whole pairs.

    Args:
        channels: of the structure maps.
        threads: that decode.
    """

    def __init__(self, channels: int, threads: int = 1) -> None:
        import_dali()
        self.channels, self.threads = channels, threads
        self._pipelines: dict[MapKind | Literal["image"], Any] = {}
        self._kind: MapKind | None = None

    def decode(self, pairs: Sequence[EncodedPair]) -> list[DecodedPair | UserError]:
        """One result a pair; maps must all be stored as the first one that is readable."""
        results: list[DecodedPair | UserError | None] = [self._refuse(*pair) for pair in pairs]
        left = [i for i, result in enumerate(results) if result is None]
        images = self._run("image", [pairs[i][0] for i in left])
        structures = self._structures([pairs[i][1] for i in left])
        for i, image, structure in zip(left, images, structures, strict=True):
            results[i] = self._joined(pairs[i], image, structure)
        return results  # type: ignore[return-value]  # every None has been replaced

    def _refuse(self, image: Encoded, structure: Encoded | None) -> UserError | None:
        """What headers tell."""
        try:
            size = reading.image_size(image)
            if structure is not None:
                header = reading.read_header(structure, self.channels)
                check_sizes(image, structure, size, (header.height, header.width))
                if self._kind is None:
                    self._kind = map_kind(structure)
                check_kind(structure, self._kind)
        except UserError as error:
            return error
        return None

    def _structures(self, files: Sequence[Encoded | None]) -> Sequence[np.ndarray | UserError | None]:
        present = [file for file in files if file is not None]
        if not present:
            return [None] * len(files)
        assert len(present) == len(files), "all pairs have maps, or none has"
        assert self._kind is not None, "headers have been looked at"
        if self._kind == "arrays":
            return [_or_error(reading.read_structure, file, self.channels) for file in present]
        found: list[np.ndarray | UserError | None] = []
        for file, values in zip(present, self._run(self._kind, present), strict=True):
            if isinstance(values, UserError):
                found.append(values)
                continue
            values = np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32)
            if self._kind == "integers":
                if reading.value_type(file) == np.uint8:
                    values /= STRETCH
            elif not np.isfinite(values).all():
                found.append(not_finite(file.name))
                continue
            found.append(values)
        return found

    def _joined(
        self, pair: EncodedPair, image: np.ndarray | UserError, structure: np.ndarray | UserError | None
    ) -> DecodedPair | UserError:
        if isinstance(image, UserError):
            return image
        if isinstance(structure, UserError):
            return structure
        assert structure is None or image.shape[:2] == structure.shape[1:], f"{pair[0].name}: header and pixels differ"
        return DecodedPair(image, structure)

    def _run(self, kind: MapKind | Literal["image"], files: Sequence[Encoded]) -> list[np.ndarray | UserError]:
        """Decoded (H, W, C), all at once; after a failure one by one, to find whose it was."""
        if not files:
            return []
        try:
            return self._decode(kind, files)
        except RuntimeError:
            if len(files) > 1:
                return [result for file in files for result in self._run(kind, [file])]
            return [undecodable(files[0], None if kind == "image" else self.channels)]

    def _decode(self, kind: MapKind | Literal["image"], files: Sequence[Encoded]) -> list[np.ndarray | UserError]:
        pipeline = self._pipelines.get(kind)
        if pipeline is None or pipeline.max_batch_size < len(files):
            pipeline = self._pipelines[kind] = self._pipeline(kind, len(files))
        (decoded,) = pipeline.run(file=[np.frombuffer(file.data, np.uint8) for file in files])
        return [np.array(decoded.at(i)) for i in range(len(files))]

    def _pipeline(self, kind: MapKind | Literal["image"], batch_size: int) -> Any:
        fn, types, pipeline = import_dali()
        built = pipeline(batch_size=batch_size, num_threads=self.threads, device_id=None, prefetch_queue_depth=1)
        value_types = {"image": types.UINT8, "integers": types.UINT16, "floats": types.FLOAT}
        with built:
            decoded = fn.decoders.image(
                fn.external_source(name="file", dtype=types.UINT8, ndim=1),
                output_type=types.RGB if kind == "image" or self.channels == 3 else types.GRAY,
                dtype=value_types[kind],
                adjust_orientation=False,
            )
            built.set_outputs(decoded)
        built.build()
        return built


def _or_error(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except UserError as error:
        return error


def undecodable(file: Encoded, channels: int | None) -> UserError:
    """Why DALI could not decode an image (``channels`` None) or a map; its own message names neither file nor cause."""
    try:
        if channels is None:
            reading.read_image(file)
        else:
            reading.read_structure(file, channels)
    except UserError as error:
        return error
    return UserError(f"{file.name}: DALI cannot decode it, though Pillow can; save it anew, or use --data.loader torch")


def not_finite(name: str) -> UserError:
    """A float map with holes."""
    return UserError(f"{name}: some values are not finite; fill the holes of the map first")
