"""Losses with numbers worked out by hand and at their edges; tasks from a loader's batch to loss and prediction."""

import math
from typing import Any, get_args

import pytest
import torch
from dense_cases import Maps, tiny_backbone, tiny_image
from torch import Tensor, nn

from sgmim_fast import UserError
from sgmim_fast.config import DepthConfig, DepthEvalConfig, Encoder, SegmentationConfig, SegmentationEvalConfig
from sgmim_fast.tasks.depth import DepthTask
from sgmim_fast.tasks.losses import pixel_cross_entropy, silog_loss
from sgmim_fast.tasks.segmentation import SegmentationTask


def silog(prediction: Tensor, target: Tensor, lambd: float = 0.5) -> Tensor:
    return silog_loss(prediction, target, lambd, 1e-3, 10.0)


def test_silog_by_hand() -> None:
    """Errors ln 2 and -ln 4, of mean -ln(2) / 2 and mean square 5/2 ln(2)^2."""
    prediction = torch.tensor([[[[2.0, 1.0, 5.0, 5.0]]]], dtype=torch.float64)
    target = torch.tensor([[[[1.0, 4.0, 0.0, 10.0]]]], dtype=torch.float64)
    for lambd, square in ((0.0, 2.5), (0.5, 2.375), (0.85, 2.2875), (1.0, 2.25)):
        assert silog(prediction, target, lambd).item() == pytest.approx(math.log(2) * math.sqrt(square), rel=1e-14)


def test_silog_is_the_formula_of_its_sources() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.rand(2, 1, 9, 7, generator=generator, dtype=torch.float64) * 9 + 0.1
    target = torch.rand(2, 1, 9, 7, generator=generator, dtype=torch.float64) * 9 + 0.1
    target[0, 0, :3] = 0
    valid = target > 0
    error = target[valid].log() - prediction[valid].log()
    expected = torch.sqrt(error.pow(2).mean() - 0.5 * error.mean().pow(2))
    torch.testing.assert_close(silog(prediction, target), expected, rtol=1e-13, atol=0)


def test_gradient_of_silog() -> None:
    generator = torch.Generator().manual_seed(1)
    prediction = (torch.rand(1, 1, 3, 3, generator=generator, dtype=torch.float64) + 0.5).requires_grad_()
    target = torch.rand(1, 1, 3, 3, generator=generator, dtype=torch.float64) + 0.5
    target[0, 0, 0] = 0
    assert torch.autograd.gradcheck(lambda p: silog(p, target), prediction)


@pytest.mark.parametrize(
    ("prediction", "target"),
    [(3.0, 0.0), (3.0, 10.0), (3.0, torch.inf), (3.0, torch.nan), (3.0, 3.0), (0.0, 0.0), (torch.nan, 0.0)],
    ids=["no target", "too far", "infinite", "not a number", "perfect", "predicted 0 there", "predicted nan there"],
)
def test_silog_without_error_is_zero_and_so_is_its_gradient(prediction: float, target: float) -> None:
    predicted = torch.full((2, 1, 4, 4), prediction, requires_grad=True)
    loss = silog(predicted, torch.full((2, 1, 4, 4), target))
    loss.backward()
    assert loss.item() == 0.0
    assert predicted.grad is not None
    assert torch.equal(predicted.grad, torch.zeros_like(predicted))


def test_silog_of_predicted_zero_is_finite() -> None:
    """A sigmoid in float32 reaches 0."""
    predicted = torch.tensor([[[[0.0, 2.0]]]], requires_grad=True)
    loss = silog(predicted, torch.ones(1, 1, 1, 2))
    loss.backward()
    assert loss.isfinite()
    assert predicted.grad is not None
    assert predicted.grad.isfinite().all()


def test_silog_keeps_a_predicted_nan_in_sight() -> None:
    """Where there is a target, a prediction that is not a number must be seen as such."""
    assert silog(torch.full((1, 1, 2, 2), torch.nan), torch.ones(1, 1, 2, 2)).isnan()


def test_silog_takes_no_other_shape() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        silog(torch.ones(2, 1, 4, 4), torch.ones(2, 4, 4))


def test_cross_entropy_by_hand() -> None:
    """Two of three pixels count: even odds over four classes, and three times the others' odds for the right one."""
    logits = torch.zeros(1, 4, 1, 3)
    logits[0, 2, 0, 1] = math.log(3)
    label = torch.tensor([[[0, 2, 255]]])
    expected = (math.log(4) + math.log(2)) / 2
    assert pixel_cross_entropy(logits, label).item() == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_of_ignored_pixels_is_zero_and_so_is_its_gradient() -> None:
    logits = torch.randn(2, 5, 3, 3, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.full((2, 3, 3), 255))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def depth_batch(size: tuple[int, int] = (64, 96)) -> dict[str, Tensor]:
    depth = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(3)) * 12
    depth[:, :, : size[0] // 2] = 0
    return {"image": tiny_image(size=size), "depth": depth}


@pytest.mark.parametrize("head", ["glp", "dpt"])
@pytest.mark.parametrize("size", [(64, 96), (45, 67)])
def test_depth_task(head: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    task = DepthTask(Maps(), DepthConfig(head=head, head_channels=4))  # type: ignore[arg-type]
    batch = depth_batch(size)
    output = task(batch)
    assert output._fields == ("loss",)
    torch.testing.assert_close(output.loss, silog(task.predict(batch["image"]), batch["depth"]))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in task.head.parameters())
    depth = task.eval().predict(batch["image"])
    assert (depth.shape, depth.dtype) == ((2, 1, *size), torch.float32)


def test_depth_task_learns() -> None:
    torch.manual_seed(0)
    task = DepthTask(Maps(), DepthConfig(head_channels=8))
    batch = depth_batch()
    batch["depth"] = batch["depth"].clamp(1, 3)
    optimizer = torch.optim.AdamW(task.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = task(batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def label_batch(size: tuple[int, int] = (64, 96), classes: int = 5) -> dict[str, Tensor]:
    label = torch.randint(0, classes, (2, *size), generator=torch.Generator().manual_seed(4))
    label[:, :, -9:] = 255
    return {"image": tiny_image(size=size), "label": label}


def segmentation(**fields: float) -> SegmentationTask:
    torch.manual_seed(0)
    tiny: dict[str, Any] = {"classes": 5, "head_channels": 8, "auxiliary_channels": 4, "dropout": 0.0}
    return SegmentationTask(Maps(), SegmentationConfig(**tiny | fields))


@pytest.mark.parametrize("size", [(64, 96), (45, 67)])
def test_segmentation_task(size: tuple[int, int]) -> None:
    task = segmentation()
    batch = label_batch(size)
    output = task(batch)
    assert output._fields == ("loss", "segmentation_loss", "auxiliary_loss")
    torch.testing.assert_close(output.loss, output.segmentation_loss + 0.4 * output.auxiliary_loss)
    torch.testing.assert_close(
        output.segmentation_loss, pixel_cross_entropy(task.predict(batch["image"]), batch["label"])
    )
    assert output.auxiliary_loss != output.segmentation_loss
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in task.parameters())
    logits = task.eval().predict(batch["image"])
    assert (logits.shape, logits.dtype) == ((2, 5, *size), torch.float32)


def test_segmentation_without_auxiliary_head() -> None:
    task = segmentation(auxiliary_weight=0.0)
    output = task(label_batch())
    assert output.auxiliary_loss is None
    assert torch.equal(output.loss, output.segmentation_loss)
    assert not any(name.startswith("auxiliary") for name, _ in task.named_parameters())


def test_auxiliary_head_needs_a_third_map() -> None:
    with pytest.raises(UserError, match="reads the backbone's third map, and there are 2"):
        SegmentationTask(Maps((8, 8), (4, 8)), SegmentationConfig())


def test_batch_of_ignored_pixels_teaches_nothing() -> None:
    task = segmentation()
    batch = label_batch()
    output = task({**batch, "label": torch.full_like(batch["label"], 255)})
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert not any(parameter.grad.any() for parameter in task.parameters())  # type: ignore[union-attr]


def test_segmentation_task_learns() -> None:
    """Which of three channels is the largest on average in 4 x 4 pixels."""
    task = segmentation(classes=3)
    image = tiny_image().repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :64, :96]
    batch = {"image": image, "label": image.argmax(1)}
    optimizer = torch.optim.AdamW(task.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = task(batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("encoder", get_args(Encoder))
@pytest.mark.parametrize("kind", ["glp", "dpt", "segmentation"])
def test_tasks_with_real_backbones(encoder: Encoder, kind: str) -> None:
    """Sizes that neither patches nor windows divide, a step that reaches every parameter, and the same in bf16."""
    size = (50, 71)
    task: nn.Module
    if kind == "segmentation":
        config = SegmentationConfig(classes=5, head_channels=8, auxiliary_channels=4)
        task, batch, channels = SegmentationTask(tiny_backbone(encoder, norm="all"), config), label_batch(size), 5
    else:
        backbone = tiny_backbone(encoder, norm="last" if kind == "glp" else "all")
        depth = DepthConfig(head=kind, head_channels=4)  # type: ignore[arg-type]
        task, batch, channels = DepthTask(backbone, depth), depth_batch(size), 1
    optimizer = torch.optim.SGD(task.parameters(), 1e-3)
    for _ in range(2):  # Swin V2 and the head begin with branches at or near zero
        optimizer.zero_grad()
        task(batch).loss.backward()
        optimizer.step()
    unread = ("pyramid.0", "pyramid.1") if kind == "glp" else ()
    for name, parameter in task.named_parameters():
        if not name.startswith(tuple(f"backbone.{part}" for part in unread)):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert task.eval().predict(batch["image"]).shape == (2, channels, *size)
    assert task.bfloat16()(batch).loss.dtype == torch.float32


def test_bf16_segmentation_task_has_float32_losses() -> None:
    task = segmentation().bfloat16()
    batch = label_batch()
    assert {loss.dtype for loss in task(batch)} == {torch.float32}
    assert task.predict(batch["image"]).dtype == torch.float32


def test_bf16_depth_task_has_a_float32_loss() -> None:
    task = DepthTask(Maps(), DepthConfig(head_channels=4)).bfloat16()
    batch = depth_batch()
    assert task(batch).loss.dtype == torch.float32
    assert task.predict(batch["image"]).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "fields", "complaint"),
    [
        (DepthConfig, {"head": "midas"}, "depth.head 'midas' is unknown; choose one of glp, dpt"),
        (DepthConfig, {"head_channels": 0}, "depth.head_channels 0 must be 1 or more"),
        (DepthConfig, {"min_depth": 0.0}, "depth.min_depth 0.0 and depth.max_depth 10.0 must be positive"),
        (DepthConfig, {"max_depth": 1e-3}, "depth.min_depth 0.001 and depth.max_depth 0.001"),
        (DepthConfig, {"silog_lambda": 1.5}, r"depth.silog_lambda 1.5 must be in \[0, 1\]"),
        (DepthEvalConfig, {"windows": 0}, "evaluation.windows 0 must be 1 or more"),
        (DepthEvalConfig, {"crop": "kitti"}, "evaluation.crop 'kitti' is unknown"),
        (SegmentationConfig, {"classes": 256}, "segmentation.classes 256 must be 1 to 255"),
        (SegmentationConfig, {"head_channels": 0}, "segmentation.head_channels 0 must be 1 or more"),
        (SegmentationConfig, {"auxiliary_channels": 0}, "segmentation.auxiliary_channels 0 must be 1 or more"),
        (SegmentationConfig, {"auxiliary_weight": -1.0}, "segmentation.auxiliary_weight -1.0 is negative"),
        (SegmentationConfig, {"dropout": 1.0}, r"segmentation.dropout 1.0 must be in \[0, 1\)"),
        (SegmentationEvalConfig, {"mode": "tiled"}, "evaluation.mode 'tiled' is unknown"),
        (SegmentationEvalConfig, {"stride": 513}, "evaluation.stride 513 must be between 1 and evaluation.crop 512"),
    ],
)
def test_bad_settings_are_named(make: type, fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        make(**fields)
