"""Metrics of segmentation, from one confusion matrix over all pixels of all images."""

import torch
from torch import Tensor

from sgmim_fast.config import IGNORED_LABEL
from sgmim_fast.errors import UserError


class SegmentationMetrics:
    """Mean intersection over union, mean and overall accuracy, as mmsegmentation defines them.

    Pixels of label 255 do not count, whatever was predicted there.

    Args:
        classes: number of classes.
        device: where the counts are kept.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.classes = classes
        self.state = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        """Pixels by class (rows) and prediction (columns). Those of several ranks add up to that of all images."""

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count a batch.

        Args:
            prediction: (B, H, W) int64 classes, or (B, classes, H, W) scores of which the largest counts.
            label: (B, H, W) int64, 255 where ignored.

        Raises:
            UserError: if a label or a prediction is no class, scores are of other classes or no numbers, or sizes
                differ.
        """
        # Imported here: it takes seconds, and tasks without classes do without.
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        if prediction.is_floating_point():
            prediction = self._largest(prediction)
        if prediction.shape != label.shape:
            raise UserError(
                f"classes were predicted as {tuple(prediction.shape)} and labelled as {tuple(label.shape)} (images, "
                "height, width); resize the scores to the labels"
            )
        self._check_range("labels", label[label != IGNORED_LABEL], f" and {IGNORED_LABEL}; check the label maps")
        self._check_range("predictions", prediction, "; they must be of as many classes")
        matrix = multiclass_confusion_matrix(
            prediction, label, self.classes, ignore_index=IGNORED_LABEL, validate_args=False
        )
        self.state += matrix.to(self.state.device)

    def _largest(self, scores: Tensor) -> Tensor:
        if scores.shape[1] != self.classes:
            raise UserError(
                f"scores are of {scores.shape[1]} classes, and segmentation.classes is {self.classes}; use the model "
                "with the number of classes that it was trained with"
            )
        largest, prediction = scores.max(1)
        if largest.isnan().any():  # which max takes for the largest, wherever it stands
            raise UserError("scores of classes hold values that are not numbers; check the weights and the image")
        return prediction

    def _check_range(self, what: str, values: Tensor, rest: str) -> None:
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.classes:
            raise UserError(
                f"{what} range from {int(values.min())} to {int(values.max())}, and segmentation.classes "
                f"{self.classes} allows 0 to {self.classes - 1}{rest}"
            )

    def class_iou(self) -> Tensor:
        """(classes,) float64: intersection over union; not a number for classes neither labelled nor predicted."""
        hits = self.state.diagonal().double()
        return hits / (self.state.sum(0) + self.state.sum(1) - hits)

    def class_accuracy(self) -> Tensor:
        """(classes,) float64: share of each class's pixels that is right; not a number for classes not labelled."""
        return self.state.diagonal().double() / self.state.sum(1)

    def compute(self) -> dict[str, float]:
        """Fractions: "mIoU", "mAcc" and "aAcc"; the means are over classes that have a value.

        A class that is predicted but nowhere labelled has an IoU of 0, which enters mIoU, and no accuracy.

        Raises:
            UserError: if no pixel counted.
        """
        pixels = int(self.state.sum())
        if not pixels:
            raise UserError(f"every pixel has label {IGNORED_LABEL}, which is ignored; check the label maps")
        return {
            "mIoU": self.class_iou().nanmean().item(),
            "mAcc": self.class_accuracy().nanmean().item(),
            "aAcc": int(self.state.diagonal().sum()) / pixels,
        }
