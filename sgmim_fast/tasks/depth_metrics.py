"""Metrics of depth: computed for each image, then averaged over images, as BTS and MIM-Depth-Estimation do."""

import torch
from torch import Tensor

from sgmim_fast.config import DepthCrop
from sgmim_fast.errors import UserError

DEPTH_METRICS = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")
"""Shares of pixels whose ratio to the target is below 1.25, 1.25^2, 1.25^3 (higher is better), and errors."""

NYU_SIZE = (480, 640)
_FRACTIONS = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}


def crop_slices(crop: DepthCrop, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns that count in an image of ``size``.

    "garg" and "eigen" are KITTI's, as fractions of the image that is given: MIM-Depth-Estimation takes them of the
    352 x 1216 pixels it tests on, BTS of the whole image. "nyu" is Eigen's for NYU-v2.

    Raises:
        UserError: if the crop is "nyu" and the image is not of NYU-v2's size.
    """
    height, width = size
    if crop == "none":
        return slice(0, height), slice(0, width)
    if crop == "nyu":
        if size != NYU_SIZE:
            raise UserError(
                f'evaluation.crop "nyu" is for images of {NYU_SIZE[0]} x {NYU_SIZE[1]} pixels, this one has {height} x '
                f'{width}; choose "none"'
            )
        return slice(45, 471), slice(41, 601)
    top, bottom, left, right = _FRACTIONS[crop]
    return slice(int(top * height), int(bottom * height)), slice(int(left * width), int(right * width))


def image_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """The values of ``DEPTH_METRICS`` over valid pixels of one image, (N,) metres each and N > 0, in float64.

    ``silog`` is KITTI's and BTS's: 100 times the standard deviation of the logarithmic error. MIM-Depth-Estimation
    prints another under that name, the loss with lambda 0.5. The other eight are the same in both.
    """
    prediction, target = prediction.double(), target.double()
    ratio = torch.maximum(prediction / target, target / prediction)
    error = prediction - target
    log_error = prediction.log() - target.log()
    return torch.stack(
        (
            *((ratio < 1.25**power).double().mean() for power in (1, 2, 3)),
            (error.abs() / target).mean(),
            (error.square() / target).mean(),
            error.square().mean().sqrt(),
            log_error.square().mean().sqrt(),
            (prediction.log10() - target.log10()).abs().mean(),
            100 * log_error.var(correction=0).sqrt(),
        )
    )


class DepthMetrics:
    """Sums over images of their metrics.

    An image without a valid pixel (target strictly between the two depths, inside the crop) is skipped and counted.

    Args:
        min_depth: metres; predictions below are raised to it, and so are those that are not a number.
        max_depth: metres; predictions above, infinity included, are lowered to it.
        crop: the part of each image that counts.
        device: where the sums are kept.
    """

    def __init__(
        self, min_depth: float, max_depth: float, crop: DepthCrop = "none", device: torch.device | str = "cpu"
    ) -> None:
        self.min_depth, self.max_depth, self.crop = min_depth, max_depth, crop
        self.state = torch.zeros(len(DEPTH_METRICS) + 2, dtype=torch.float64, device=device)
        """Sums of the metrics, images counted, images skipped. Those of several ranks add up to that of all images."""

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            prediction: (B, 1, H, W) metres.
            target: (B, 1, H, W) metres, 0 where unknown.

        Raises:
            UserError: if the two differ in shape, or the crop does not fit the images.
        """
        if prediction.shape != target.shape:
            raise UserError(
                f"depth was predicted as {tuple(prediction.shape)} and measured as {tuple(target.shape)} (images, "
                "channels, height, width); resize the prediction to the measured map"
            )
        rows, columns = crop_slices(self.crop, (target.shape[-2], target.shape[-1]))
        low, high = self.min_depth, self.max_depth
        limited = prediction.nan_to_num(nan=low, posinf=high, neginf=low).clamp(low, high)
        for depth, truth in zip(limited[..., rows, columns], target[..., rows, columns], strict=True):
            valid = (truth > low) & (truth < high)
            if valid.any():
                self.state[:-2] += image_errors(depth[valid], truth[valid]).to(self.state.device)
                self.state[-2] += 1
            else:
                self.state[-1] += 1

    @property
    def images(self) -> int:
        """Images that entered the averages."""
        return int(self.state[-2])

    @property
    def skipped(self) -> int:
        """Images without a valid pixel."""
        return int(self.state[-1])

    def compute(self) -> dict[str, float]:
        """The averages over images, by the names of ``DEPTH_METRICS``.

        Raises:
            UserError: if no image had a valid pixel.
        """
        if not self.images:
            raise UserError(
                f"none of {self.skipped} images has a depth between {self.min_depth} and {self.max_depth} metres "
                f'inside crop "{self.crop}"; check the scale of the depth maps, depth.max_depth and evaluation.crop'
            )
        return dict(zip(DEPTH_METRICS, (self.state[:-2] / self.images).tolist(), strict=True))
