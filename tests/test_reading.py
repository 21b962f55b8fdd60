"""Decoders of images and maps: exact values, and one clear line for every file that cannot be used."""

import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from sgmim_fast.data.reading import exif_orientation, image_size, read_image, read_structure
from sgmim_fast.errors import UserError

H, W = 24, 37
RNG = np.random.default_rng(0)
GREY16 = RNG.integers(0, 65536, (H, W)).astype(np.uint16)
GREY8 = (GREY16 >> 8).astype(np.uint8)
FLOATS = RNG.standard_normal((H, W)).astype(np.float32) * 1e3
RGB8 = RNG.integers(0, 256, (H, W, 3)).astype(np.uint8)


def save_png16_rgb(path: Path, values: np.ndarray) -> None:
    """A 16-bit RGB PNG, which Pillow cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    )


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def refused(call: Callable[[], object], path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


@pytest.mark.parametrize(
    ("name", "values", "options"),
    [
        ("a.png", GREY16, {}),
        ("a.png", GREY8, {}),
        ("a.jp2", GREY16, {}),
        ("a.jpx", GREY16, {}),
        ("a.j2k", GREY16, {}),
        ("a.jp2", GREY8, {}),
        ("a.tif", FLOATS, {}),
        ("a.tiff", FLOATS, {"compression": "tiff_lzw"}),
        ("a.tif", FLOATS, {"compression": "tiff_deflate"}),
        ("a.tif", GREY16, {}),
        ("a.tif", GREY16, {"compression": "tiff_lzw"}),
        ("a.tif", GREY16.astype(">u2"), {}),
        ("a.TIF", GREY8, {}),
        ("a.png", np.full((H, W), 7, np.uint8), {}),
    ],
)
def test_one_channel_files_come_back_bit_for_bit(tmp_path: Path, name: str, values: np.ndarray, options: dict) -> None:
    path = tmp_path / name
    Image.fromarray(values).save(path, **options)
    read = read_structure(path, 1)
    assert (str(read.dtype), read.shape, read.flags.c_contiguous) == ("float32", (1, H, W), True)
    np.testing.assert_array_equal(read[0], values.astype(np.float32))
    assert image_size(path) == (H, W)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.uint16, np.int32, ">f4"])
def test_npy_of_every_real_type(tmp_path: Path, dtype: npt.DTypeLike) -> None:
    path = tmp_path / "a.npy"
    values = (FLOATS % 200).astype(dtype)
    np.save(path, np.asfortranarray(values))
    np.testing.assert_array_equal(read_structure(path, 1)[0], values.astype(np.float32))
    assert image_size(path) == (H, W)


def test_npy_channel_layouts(tmp_path: Path) -> None:
    path = tmp_path / "a.NPY"
    first = RNG.standard_normal((2, H, W)).astype(np.float32)
    for stored in (first, first.transpose(1, 2, 0)):
        with open(path, "wb") as file:
            np.save(file, stored)
        np.testing.assert_array_equal(read_structure(path, 2), first)
        assert image_size(path, 2) == (H, W)
    with open(path, "wb") as file:
        np.save(file, FLOATS[..., None])
    np.testing.assert_array_equal(read_structure(path, 1)[0], FLOATS)
    refused(lambda: read_structure(path, 3), path, "(24, 37, 1)", "3 channel(s)")


def test_many_channels_of_8_bits_and_jpeg(tmp_path: Path) -> None:
    for name in ("a.png", "a.jp2", "a.tif"):
        Image.fromarray(RGB8).save(tmp_path / name)
        np.testing.assert_array_equal(read_structure(tmp_path / name, 3), RGB8.transpose(2, 0, 1))
    smooth = np.add.outer(np.arange(H), 3 * np.arange(W)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_structure(tmp_path / "a.jpg", 1)[0] - smooth).max() <= 4


def test_wrong_number_of_channels(tmp_path: Path) -> None:
    colour, grey = tmp_path / "colour.png", tmp_path / "grey.png"
    Image.fromarray(RGB8).save(colour)
    Image.fromarray(GREY8).save(grey)
    refused(lambda: read_structure(colour, 1), colour, "3 channel(s)", "--model.structure-channels")
    refused(lambda: read_structure(grey, 3), grey, "1 channel(s)")


def test_files_that_would_lose_precision_are_refused(tmp_path: Path) -> None:
    png, jp2, tif, ints = (tmp_path / name for name in ("a.png", "a.jp2", "a.tif", "ints.tif"))
    save_png16_rgb(png, np.stack([GREY16] * 3, -1))
    Image.fromarray(RGB8).save(jp2)
    codestream = jp2.read_bytes().index(b"\xff\x4f\xff\x51")
    data = bytearray(jp2.read_bytes())
    assert data[codestream + 42] == 7  # bits - 1 of the first component
    data[codestream + 42] = 15
    jp2.write_bytes(data)
    Image.fromarray(RGB8).save(tif)
    replace_bytes(tif, struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16))
    for path in (png, jp2, tif):
        refused(partial(read_structure, path, 3), path, "16 bits", "without loss", ".npy")
    Image.fromarray(GREY16.astype(np.int32)).save(ints)
    refused(lambda: read_structure(ints, 1), ints, "32-bit integers")


def test_maps_whose_meaning_is_unclear_are_refused(tmp_path: Path) -> None:
    palette, pages, inverted, turned = (tmp_path / f"{name}.tif" for name in ("palette", "pages", "inverted", "turned"))
    Image.fromarray(GREY8).convert("P").save(palette)
    refused(lambda: read_structure(palette, 1), palette, "'P'")
    Image.fromarray(GREY8).save(pages, save_all=True, append_images=[Image.fromarray(GREY8)])
    refused(lambda: read_structure(pages, 1), pages, "2 pictures")
    Image.fromarray(GREY8).save(inverted, tiffinfo={262: 0})
    refused(lambda: read_structure(inverted, 1), inverted, "white as zero")
    Image.fromarray(GREY8).save(turned, tiffinfo={274: 6})
    refused(lambda: read_structure(turned, 1), turned, "orientation")
    refused(lambda: read_image(turned), turned, "orientation")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    values = FLOATS.copy()
    values[3, 4] = bad
    tif, npy = tmp_path / "a.tif", tmp_path / "a.npy"
    Image.fromarray(values).save(tif)
    np.save(npy, values.astype(np.float64))
    for path in (tif, npy):
        refused(partial(read_structure, path, 1), path, "1 of 888 values are not finite")


@pytest.mark.filterwarnings("error")
def test_float64_beyond_float32(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([[1.0, 1e300]]))
    refused(lambda: read_structure(path, 1), path, "not finite in float32")


def test_npy_files_that_hold_no_map(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([[None, {}]], dtype=object), allow_pickle=True)
    refused(lambda: read_structure(path, 1), path, "cannot be read")
    for values in (np.zeros((2, 2), complex), np.zeros((2, 2), bool), np.array([["a"]])):
        np.save(path, values)
        refused(lambda: read_structure(path, 1), path, "real numbers")
    np.save(path, np.zeros(5))
    refused(lambda: read_structure(path, 1), path, "(5,)")
    with open(path, "wb") as file:
        np.savez(file, np.zeros((2, 2)))
    refused(lambda: read_structure(path, 1), path, "cannot be read")


@pytest.mark.parametrize("name", ["a.png", "a.jp2", "a.tif", "lzw.tif", "a.npy", "a.jpg"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.97])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_truncated_maps(tmp_path: Path, name: str, keep: float) -> None:
    path = tmp_path / name
    values = GREY8 if name.endswith("jpg") else GREY16
    if name.endswith("npy"):
        np.save(path, values)
    else:
        Image.fromarray(values).save(path, **({"compression": "tiff_lzw"} if name == "lzw.tif" else {}))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    refused(lambda: read_structure(path, 1), path, "cannot be read", "replace it")
    if not name.endswith("npy"):
        refused(lambda: read_image(path), path, "cannot be read")


def test_missing_foreign_and_directory_files(tmp_path: Path) -> None:
    for name in ("absent.png", "absent.npy"):
        path = tmp_path / name
        refused(partial(read_structure, path, 1), path, "does not exist")
        refused(partial(image_size, path), path, "does not exist")
    postscript = tmp_path / "a.jpg"  # Pillow would hand this one to an outside program
    postscript.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    refused(lambda: read_image(postscript), postscript, "no picture of a known format")
    refused(lambda: read_image(tmp_path), tmp_path, "cannot be read")


def test_images_become_rgb(tmp_path: Path) -> None:
    png = tmp_path / "a.png"
    Image.fromarray(RGB8).save(png)
    np.testing.assert_array_equal(np.asarray(read_image(png)), RGB8)
    Image.fromarray(GREY16).save(png)
    np.testing.assert_array_equal(np.asarray(read_image(png)), np.stack([GREY8] * 3, -1))
    Image.fromarray(np.dstack([RGB8, GREY8])).save(png)
    np.testing.assert_array_equal(np.asarray(read_image(png)), RGB8)
    palette = Image.fromarray(RGB8).quantize(16)
    palette.save(png, transparency=3)
    np.testing.assert_array_equal(np.asarray(read_image(png)), np.asarray(palette.convert("RGB")))
    for mode in ("1", "L", "LA"):
        source = Image.fromarray(GREY8).convert(mode)
        source.save(png)
        np.testing.assert_array_equal(np.asarray(read_image(png)), np.asarray(source.convert("RGB")))
    jpeg = tmp_path / "a.jpg"
    blue = Image.new("RGB", (W, H), (10, 20, 200))
    blue.convert("CMYK").save(jpeg, quality=95)
    assert np.abs(np.asarray(read_image(jpeg)).astype(int) - (10, 20, 200)).max() <= 3
    floats = tmp_path / "a.tif"
    Image.fromarray(FLOATS).save(floats)
    refused(lambda: read_image(floats), floats, "8-bit RGB")


def test_exif_orientation_is_reported_and_not_applied(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(RGB8).save(path, exif=exif)
    assert read_image(path).size == (W, H)
    assert image_size(path) == (H, W)
    assert exif_orientation(path) == 6
    Image.fromarray(RGB8).save(path)
    assert exif_orientation(path) == 1
