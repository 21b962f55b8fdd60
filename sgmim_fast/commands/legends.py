"""What stands below a picture of a prediction: a scale of metres, or the names of classes."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from sgmim_fast.tasks.pictures import LegendEntry, depth_picture

_LINE = 18  # pixels
_MARGIN = 6
_FONT = 12
_INK = (32, 32, 32)


def below(picture: Image.Image, strip: Image.Image) -> Image.Image:
    """A picture with a strip of the same width under it."""
    whole = Image.new("RGB", (picture.width, picture.height + strip.height), "white")
    whole.paste(picture, (0, 0))
    whole.paste(strip, (0, picture.height))
    return whole


def depth_legend_strip(width: int, limits: tuple[float, float]) -> Image.Image:
    """The colours from the nearest to the farthest depth, and both in metres."""
    low, high = limits
    strip = Image.new("RGB", (width, _LINE + 2 * _MARGIN), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(size=_FONT)
    near, far = f"{low:.2f} m", f"{high:.2f} m"
    left = _MARGIN + round(draw.textlength(near, font=font)) + _MARGIN
    right = width - round(draw.textlength(far, font=font)) - 2 * _MARGIN
    draw.text((_MARGIN, _MARGIN), near, fill=_INK, font=font)
    draw.text((right + _MARGIN, _MARGIN), far, fill=_INK, font=font)
    if right > left and high > low:
        ramp = torch.linspace(max(low, 1e-6), high, right - left).expand(_LINE, -1)
        strip.paste(Image.fromarray(depth_picture(ramp, limits)), (left, _MARGIN))
    return strip


def class_legend_strip(width: int, entries: Sequence[LegendEntry]) -> Image.Image:
    """Colour, name and share of each class, in as many lines as it takes."""
    font = ImageFont.load_default(size=_FONT)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places: list[tuple[int, int, LegendEntry, str]] = []
    x, y = _MARGIN, _MARGIN
    for entry in entries:
        text = f"{entry.name} {100 * entry.share:.0f} %"
        needed = _LINE + round(measure.textlength(text, font=font)) + 2 * _MARGIN
        if x > _MARGIN and x + needed > width:
            x, y = _MARGIN, y + _LINE
        places.append((x, y, entry, text))
        x += needed
    strip = Image.new("RGB", (width, y + _LINE + _MARGIN), "white")
    draw = ImageDraw.Draw(strip)
    for left, top, entry, text in places:
        draw.rectangle((left, top + 2, left + _FONT, top + 2 + _FONT), fill=entry.color)
        draw.text((left + _LINE, top), text, fill=_INK, font=font)
    return strip
