"""Heads: sizes, ranges, names of the originals, gradients."""

import pytest
import torch
from dense_cases import Maps, tiny_image
from torch import nn

from sgmim_fast import UserError
from sgmim_fast.models.heads.glp import GLPHead, from_mim_depth
from sgmim_fast.models.heads.maps import upsample_to_image


def glp(filters: int = 8, max_depth: float = 10.0) -> tuple[Maps, GLPHead]:
    torch.manual_seed(0)
    maps = Maps()
    return maps, GLPHead(maps.channels, maps.strides[-1], filters, max_depth)


@pytest.mark.parametrize("size", [(64, 96), (50, 70), (33, 1)])
def test_glp_is_of_the_image_size(size: tuple[int, int]) -> None:
    maps, head = glp()
    depth = head(maps(tiny_image(size=size)), size)
    assert depth.shape == (2, 1, *size)
    assert depth.dtype == torch.float32
    assert (depth > 0).all()
    assert (depth < 10).all()


def test_glp_cuts_what_lies_outside_the_image() -> None:
    """The same maps for a smaller image give the upper left part of the same depth."""
    maps, head = glp()
    features = maps(tiny_image())
    whole = head.eval()(features, (64, 96))
    assert torch.equal(head(features, (40, 77)), whole[..., :40, :77])


@pytest.mark.parametrize(("stride", "side"), [(8, 64), (16, 64), (64, 64)])
def test_glp_takes_other_strides(stride: int, side: int) -> None:
    maps = Maps((8, 8), (4, stride))
    head = GLPHead(maps.channels, stride, 4, 10.0)
    image = tiny_image(size=(side, side))
    assert head.deconvolve(maps(image)[-1]).shape[-1] == 8 * side // stride
    assert head(maps(image), (side, side)).shape == (2, 1, side, side)


@pytest.mark.parametrize("stride", [4, 24])
def test_glp_says_which_strides_it_takes(stride: int) -> None:
    with pytest.raises(UserError, match=f"stride {stride} must be 8, 16, 32"):
        GLPHead((8, 8), stride, 4, 10.0)


class MimDepth(nn.Module):
    """What MIM-Depth-Estimation puts behind its encoder, with its names and shapes (three 2 x 2 deconvolutions)."""

    def __init__(self, channels_in: int, channels_out: int, filters: int) -> None:
        super().__init__()
        self.decoder = nn.Module()
        layers: list[nn.Module] = []
        for width in (channels_in, filters, filters):
            layers += [nn.ConvTranspose2d(width, filters, 2, 2, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
        self.decoder.deconv_layers = nn.Sequential(*layers)
        self.decoder.conv_layers = nn.Sequential(
            nn.Conv2d(filters, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()
        )
        self.last_layer_depth = nn.Sequential(
            nn.Conv2d(channels_out, channels_out, 3, padding=1), nn.ReLU(), nn.Conv2d(channels_out, 1, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.decoder.conv_layers(self.decoder.deconv_layers(x))
        up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        return torch.sigmoid(self.last_layer_depth(up(up(x)))) * 10.0


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("training", [True, False])
def test_heads_of_mim_depth_load_and_give_the_same(prefix: str, training: bool) -> None:
    maps, head = glp()
    theirs = MimDepth(32, 8, 8).train(training)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1.0)
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    state[f"{prefix}encoder.norm3.weight"] = torch.zeros(3)
    head.load_state_dict(from_mim_depth(state))
    features = maps(tiny_image())
    torch.testing.assert_close(head.train(training)(features, (64, 96)), theirs(features[-1]))


def test_glp_begins_as_the_original() -> None:
    """Normal weights of 0.001, so that every pixel begins at half of the range."""
    maps, head = glp(filters=32)
    for module in head.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.weight.numel() > 1000:
            assert module.weight.std().item() == pytest.approx(0.001, rel=0.1)
    depth = head(maps(tiny_image()), (64, 96))
    torch.testing.assert_close(depth, torch.full_like(depth, 5.0), rtol=1e-3, atol=0)


def test_every_parameter_of_glp_learns() -> None:
    maps, head = glp()
    head(maps(tiny_image()), (64, 96)).log().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_bf16_head_predicts_in_float32() -> None:
    maps, head = glp()
    features = maps.bfloat16()(tiny_image().bfloat16())
    assert head.bfloat16()(features, (64, 96)).dtype == torch.float32


def test_upsampling_does_not_shift_maps_of_odd_sizes() -> None:
    """A map that covers more than the image: its samples stay where they are in the image."""
    ramp = torch.arange(6.0).repeat(6, 1)[None, None]
    found = upsample_to_image(ramp, 4, (21, 21))
    assert torch.equal(found, torch.nn.functional.interpolate(ramp, scale_factor=4, mode="bilinear")[..., :21, :21])
    with pytest.raises(UserError, match="24 x 24 pixels does not cover the image of 25 x 20"):
        upsample_to_image(ramp, 4, (25, 20))
