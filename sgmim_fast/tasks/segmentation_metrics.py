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
            UserError: if a label is no class, or the sizes differ.
        """
        # Imported here: it takes seconds, and tasks without classes do without.
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        if prediction.is_floating_point():
            prediction = prediction.argmax(1)
        if prediction.shape != label.shape:
            raise UserError(
                f"classes were predicted as {tuple(prediction.shape)} and labelled as {tuple(label.shape)} (images, "
                "height, width); resize the scores to the labels"
            )
        counted = label[label != IGNORED_LABEL]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < self.classes:
            raise UserError(
                f"labels range from {int(counted.min())} to {int(counted.max())}, and segmentation.classes "
                f"{self.classes} allows 0 to {self.classes - 1} and {IGNORED_LABEL}; check the label maps"
            )
        matrix = multiclass_confusion_matrix(
            prediction, label, self.classes, ignore_index=IGNORED_LABEL, validate_args=False
        )
        self.state += matrix.to(self.state.device)

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
