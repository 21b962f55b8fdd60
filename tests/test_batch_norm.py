"""Batch normalisation: two real ranks against one, casts to bf16, and PyTorch's own on one rank."""

import datetime
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from sgmim_fast import UserError
from sgmim_fast.models.batch_norm import SyncedBatchNorm, sync_batch_norms

SIZES = ((2, 2), (3, 1))  # images of each rank, which need not be as many


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), SyncedBatchNorm(6), nn.ReLU(True), nn.Conv2d(6, 4, 1), SyncedBatchNorm(4, momentum=0.3)
    ).double()
    for module in model.modules():
        if isinstance(module, SyncedBatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 100 + torch.randn(4, 3, 5, 4, generator=generator, dtype=torch.float64)


def step(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Two training steps' worth of statistics; output and gradients of the second, of a loss that sums over pixels."""
    model(image * 2 + 1)
    image = image.clone().requires_grad_()
    output = model(image)
    output.sin().sum().backward()
    assert image.grad is not None
    found = {"output": output.detach(), "image": image.grad}
    found |= {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def rank_main(rank: int, folder: str, counts: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    first = sum(counts[:rank])
    torch.save(step(layers(), images()[first : first + counts[rank]]), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize("counts", SIZES)
def test_two_ranks_are_one_with_all_images(counts: tuple[int, int], tmp_path: Path) -> None:
    mp.spawn(rank_main, (str(tmp_path), counts), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    close = {"rtol": 1e-9, "atol": 1e-9}
    for name, expected in step(layers(), images()).items():
        if name in ("output", "image"):
            found = torch.cat([rank[name] for rank in ranks])
        elif name.startswith("grad"):
            found = ranks[0][name] + ranks[1][name]
        else:
            assert torch.equal(ranks[0][name], ranks[1][name])
            found = ranks[0][name]
        torch.testing.assert_close(found, expected, **close, msg=lambda text, name=name: f"{name}: {text}")


def test_one_rank_is_pytorchs_own() -> None:
    own, peer = layers(), layers()
    for name, module in list(peer.named_children()):
        if isinstance(module, SyncedBatchNorm):
            plain = nn.BatchNorm2d(module.num_features, momentum=module.momentum).double()
            plain.load_state_dict(module.state_dict())
            setattr(peer, name, plain)
    expected = step(peer, images())
    for name, value in step(own, images()).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.eval()(images()), peer.eval()(images()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "cast", [lambda norm: norm.bfloat16(), lambda norm: norm.to(torch.bfloat16), lambda norm: norm.half()]
)
def test_running_statistics_stay_in_float32(cast: object) -> None:
    norm = SyncedBatchNorm(4)
    with torch.no_grad():
        norm.running_mean.fill_(1.001)
        norm.running_var.fill_(2.003)
    cast(norm)  # type: ignore[operator]
    assert norm.weight.dtype in (torch.bfloat16, torch.float16)
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert torch.equal(norm.running_mean, torch.full((4,), 1.001))
    assert torch.equal(norm.running_var, torch.full((4,), 2.003))
    assert set(dict(norm.named_buffers())) == {"running_mean", "running_var", "num_batches_tracked"}
    assert norm.double().running_mean.dtype == torch.float64


def test_meta_module_gets_memory() -> None:
    norm = SyncedBatchNorm(4).to("meta").bfloat16().to_empty(device="cpu")
    assert (norm.running_mean.device.type, norm.running_mean.dtype) == ("cpu", torch.float32)


def test_bf16_is_rounded_once() -> None:
    """Statistics and arithmetic in float32: what float32 gives, rounded to bf16 at the end."""
    x = (torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2)) + 50).bfloat16()
    narrow, wide = SyncedBatchNorm(3).bfloat16(), SyncedBatchNorm(3)
    for _ in range(2):
        assert torch.equal(narrow(x), wide(x.float()).bfloat16())
    assert torch.equal(narrow.running_mean, wide.running_mean)
    assert torch.equal(narrow.eval()(x), wide.eval()(x.float()).bfloat16())


def test_single_value_has_no_variance() -> None:
    with pytest.raises(UserError, match="a batch of one image gives pooled maps a single one; train with a batch of 2"):
        SyncedBatchNorm(3)(torch.ones(1, 3, 1, 1))
    SyncedBatchNorm(3).eval()(torch.ones(1, 3, 1, 1))


def test_norms_are_replaced_in_place() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, momentum=0.2), nn.ReLU())
    ).eval()
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        model[1][0].running_mean.fill_(0.3)
    before, state = model(x), model.state_dict()
    weight = model[1][0].weight
    sync_batch_norms(model)
    assert type(model[1][0]) is SyncedBatchNorm
    assert model[1][0].weight is weight
    assert not model[1][0].training
    assert state.keys() == model.state_dict().keys()
    torch.testing.assert_close(model(x), before)
    with pytest.raises(ValueError, match="0 has no weights"):
        sync_batch_norms(nn.Sequential(nn.BatchNorm2d(4, affine=False)))
