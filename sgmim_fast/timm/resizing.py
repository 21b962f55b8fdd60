"""Other windows, or another map, for an encoder that there is already."""

from torch import nn

from sgmim_fast.config import BackboneConfig
from sgmim_fast.models.swin import SwinEncoder, WindowAttention
from sgmim_fast.models.vit import SharedRelativePositionBias, ViTEncoder
from sgmim_fast.position_tables import Resampling, resize_table


def resize_windows(encoder: SwinEncoder, shape: BackboneConfig) -> None:
    """Give every stage the windows of ``shape``, which must be the encoder's own in everything else.

    Swin's position tables are resized (bicubic); Swin V2 asks its position MLP for the new offsets.
    """
    for stage, layer in enumerate(encoder.layers):
        window, shifted, _ = shape.window_of(stage)
        for number, block in enumerate(layer.blocks):  # type: ignore[arg-type]
            attention = block.attn
            if isinstance(attention, WindowAttention):
                _resize(attention, (attention.window,) * 2, (window,) * 2, "bicubic")
            attention.window = window
            attention.shift = window // 2 if shifted and number % 2 == 1 else 0


def resize_map(encoder: ViTEncoder, shape: BackboneConfig) -> None:
    """Make the position table for the image size of ``shape``, resized as weights of another size are when loaded."""
    rows, columns = shape.stage_map(0)
    _resize(encoder.rel_pos_bias, encoder.rel_pos_bias.grid, (rows, columns), "geometric")
    encoder.rel_pos_bias.grid = (rows, columns)


def _resize(
    holder: WindowAttention | SharedRelativePositionBias,
    source: tuple[int, int],
    target: tuple[int, int],
    how: Resampling,
) -> None:
    table = holder.relative_position_bias_table
    if source != target:
        resized = resize_table(table.detach(), source, target, how)
        holder.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
