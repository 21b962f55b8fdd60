"""Heads: sizes, ranges, names of the originals, gradients."""

import pytest
import torch
from dense_cases import Maps, tiny_image
from torch import nn

from sgmim_fast import UserError
from sgmim_fast.models.batch_norm import SyncedBatchNorm
from sgmim_fast.models.heads.dpt import DPTHead
from sgmim_fast.models.heads.glp import GLPHead, from_mim_depth
from sgmim_fast.models.heads.maps import upsample_to_image
from sgmim_fast.models.heads.upernet import FCNHead, UPerNetHead


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


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (16, 16, 16, 16), (8, 8, 8, 8)])
@pytest.mark.parametrize("size", [(64, 96), (50, 70), (33, 1)])
def test_dpt_is_of_the_image_size(strides: tuple[int, ...], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    maps = Maps((8, 8, 8, 8), strides)
    head = DPTHead(maps.channels, maps.strides, 2, 10.0)
    depth = head(maps(tiny_image(size=size)), size)
    assert (depth.shape, depth.dtype) == ((2, 1, *size), torch.float32)
    assert 0 < depth.min() < depth.max() < 10
    depth.log().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name


def test_dpt_reads_every_map() -> None:
    maps = Maps()
    head = DPTHead(maps.channels, maps.strides, 2, 10.0).eval()
    features = maps(tiny_image())
    before = head(features, (64, 96))
    for number in range(4):
        changed = [feature + (place == number) for place, feature in enumerate(features)]
        assert not torch.equal(head(changed, (64, 96)), before)


def test_dpt_completes_maps_with_their_last_rows_and_columns() -> None:
    maps = Maps().double()
    head = DPTHead(maps.channels, maps.strides, 2, 10.0).double().eval()
    features = maps(tiny_image(size=(50, 70)).double())
    whole = []
    for feature, stride in zip(features, maps.strides, strict=True):
        rows, columns = (
            torch.arange(side // stride).clamp(max=last - 1)
            for side, last in zip((64, 96), feature.shape[-2:], strict=True)
        )
        whole.append(feature[:, :, rows][..., columns])
    torch.testing.assert_close(head(features, (50, 70)), head(whole, (64, 96))[..., :50, :70], rtol=1e-12, atol=0)


@pytest.mark.parametrize("strides", [(4, 8, 16), (4, 8, 16, 64), (14, 14, 14, 14)])
def test_dpt_says_which_maps_it_takes(strides: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r'"dpt" takes four maps whose strides divide 32'):
        DPTHead((8,) * len(strides), strides, 2, 10.0)


def test_upernet_is_that_of_transformers() -> None:
    """An independent UPerNet with the same weights gives the same logits, at the first map's stride."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    torch.manual_seed(0)
    maps = Maps()
    config = UperNetConfig(
        hidden_size=6, num_labels=4, auxiliary_channels=5, auxiliary_num_convs=1, backbone_config={"model_type": "swin"}
    )
    theirs = UperNetHead(config, list(maps.channels)).train()
    ours = UPerNetHead(maps.channels, 4, 6, 4, dropout=0.0)
    names = {
        "decoder.psp.out_conv.": "bottleneck.",
        "decoder.fusion_block.": "fpn_bottleneck.",
        "classifier.1.": "classifier.",
        # the library goes from the coarsest lateral map to the finest
        **{f"decoder.psp.blocks.{n}.1.": f"psp_modules.{n}.1." for n in range(4)},
        **{f"decoder.fpn_lateral_blocks.{n}.conv_norm_relu.": f"lateral_convs.{2 - n}." for n in range(3)},
        **{f"decoder.fpn_conv_blocks.{n}.": f"fpn_convs.{2 - n}." for n in range(3)},
    }
    load_renamed(ours, theirs, names)
    features = [feature.detach() for feature in maps(tiny_image())]
    expected = nn.functional.interpolate(theirs(list(features)), size=(64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours(features, (64, 96)), expected, rtol=1e-4, atol=1e-5)

    auxiliary = UperNetFCNHead(config, list(maps.channels)).train()
    own = FCNHead(maps.channels[2], 16, 5, 4, dropout=0.0)
    load_renamed(own, auxiliary, {"convolve.": "convs.0.", "classifier.1.": "classifier."})
    expected = nn.functional.interpolate(auxiliary(features), size=(64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(own(features[2], (64, 96)), expected, rtol=1e-4, atol=1e-5)


def load_renamed(ours: nn.Module, theirs: nn.Module, prefixes: dict[str, str]) -> None:
    """Give ``ours`` the weights of ``theirs``: by prefix, then convolution and norm by their own names."""
    source = theirs.state_dict()
    state = {}
    for name in ours.state_dict():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        rest = name.removeprefix(prefix)
        if rest not in ("weight", "bias"):
            rest = rest.replace("0.", "conv.").replace("1.", "batch_norm.")
        state[name] = source.pop(prefixes[prefix] + rest)
    assert not source
    ours.load_state_dict(state)


def test_upernet_does_not_normalise_maps_again() -> None:
    """A backbone's maps are normalised already; scaling one of them must show."""
    maps = Maps()
    head = UPerNetHead(maps.channels, 4, 8, 3, dropout=0.0).eval()
    assert not any(isinstance(module, nn.LayerNorm) for module in head.modules())
    features = maps(tiny_image())
    before = head(features, (64, 96))
    for number in range(4):
        changed = [feature * (2 if place == number else 1) for place, feature in enumerate(features)]
        assert not torch.allclose(head(changed, (64, 96)), before)


@pytest.mark.parametrize("size", [(64, 96), (50, 70), (33, 1)])
def test_upernet_is_of_the_image_size(size: tuple[int, int]) -> None:
    maps = Maps()
    features = maps(tiny_image(size=size))
    assert UPerNetHead(maps.channels, 4, 8, 3, dropout=0.1)(features, size).shape == (2, 3, *size)
    assert FCNHead(maps.channels[2], 16, 8, 3, dropout=0.1)(features[2], size).shape == (2, 3, *size)


def test_batch_norms_of_the_library_are_replaced() -> None:
    maps = Maps()
    for head in (UPerNetHead(maps.channels, 4, 8, 3, 0.0), DPTHead(maps.channels, maps.strides, 2, 10.0)):
        kinds = {type(module) for module in head.modules() if isinstance(module, nn.BatchNorm2d)}
        assert kinds == {SyncedBatchNorm}


def test_upsampling_does_not_shift_maps_of_odd_sizes() -> None:
    """A map that covers more than the image: its samples stay where they are in the image."""
    ramp = torch.arange(6.0).repeat(6, 1)[None, None]
    found = upsample_to_image(ramp, 4, (21, 21))
    assert torch.equal(found, torch.nn.functional.interpolate(ramp, scale_factor=4, mode="bilinear")[..., :21, :21])
    with pytest.raises(UserError, match="24 x 24 pixels does not cover the image of 25 x 20"):
        upsample_to_image(ramp, 4, (25, 20))
