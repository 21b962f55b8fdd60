"""Batch normalisation over the images of all ranks, with float32 arithmetic whatever the weights are."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sgmim_fast.errors import UserError

_STATISTICS = ("running_mean", "running_var")


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training are those of all ranks together, on GPUs as on CPUs.

    Where torch.distributed runs several ranks, all of them must come through here alike, each with at least one value a
    channel; B images on each of R ranks then give what R x B images give on one. Gradients of the input are those of
    the sum of all ranks' losses, gradients of weight and bias the rank's own share, to be averaged over ranks as other
    gradients are. Statistics and arithmetic are in float32 or wider and the output is of the input's dtype; running
    statistics stay in float32 when the module is cast to a narrower dtype.

    (B, C, H, W) -> (B, C, H, W).

    Raises:
        UserError: in training, if there is a single value a channel, which has no variance.
    """

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training:
            return self._normalize(input, training=False)
        synced = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not synced and input.numel() // input.shape[1] < 2:
            raise UserError(
                "batch normalisation needs more than one value a channel, and a batch of one image gives pooled maps a "
                "single one; train with a batch of 2 or more"
            )
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if not synced:
            return self._normalize(input, training=True)
        wide = _wide(input.dtype)
        output, mean, variance, count = _Synced.apply(input, self.weight.to(wide), self.bias.to(wide), self.eps)
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            unbiased = variance * (count / (count - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return output

    def _normalize(self, x: Tensor, training: bool) -> Tensor:
        wide, momentum = _wide(x.dtype), self.momentum
        assert momentum is not None
        mean, variance = self.running_mean, self.running_var
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.batch_norm(x.to(wide), mean, variance, weight, bias, training, momentum, self.eps).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SyncedBatchNorm":
        before = {name: getattr(self, name) for name in _STATISTICS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != _wide(new.dtype):  # cast to a narrow dtype: keep the device alone
                setattr(self, name, new.float() if old.is_meta else old.to(new.device))
        return self


def sync_batch_norms(module: nn.Module) -> None:
    """Put a ``SyncedBatchNorm`` in place of every BatchNorm2d below ``module``; parameters and their names stay."""
    for parent in list(module.modules()):
        for name, old in list(parent.named_children()):
            if type(old) is not nn.BatchNorm2d:
                continue
            if not (old.affine and old.track_running_stats and old.momentum is not None):
                raise ValueError(f"{name} has no weights, running statistics or momentum")
            new = SyncedBatchNorm(old.num_features, old.eps, old.momentum)
            new.weight, new.bias = old.weight, old.bias
            for buffer in (*_STATISTICS, "num_batches_tracked"):
                setattr(new, buffer, getattr(old, buffer))
            setattr(parent, name, new.train(old.training))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _summed(*parts: Tensor) -> Tensor:
    """The parts, one after the other, summed over all ranks."""
    total = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(total)
    return total


class _Synced(torch.autograd.Function):
    """Training mode over all ranks; keeps its input alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        wide = x.to(weight.dtype)
        # Ranks may hold different numbers of values. The mean comes first: squares of centred values lose no digits.
        local = wide.new_full((1,), x.numel() // channels)
        sums = _summed(wide.sum((0, 2, 3)), local)
        count = sums[channels:]
        mean = sums[:channels] / count
        centred = wide - mean.view(-1, 1, 1)
        variance = _summed(centred.square().sum((0, 2, 3))) / count
        inverse = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.mark_non_differentiable(mean, variance, count)
        output = centred * (inverse * weight).view(-1, 1, 1) + bias.view(-1, 1, 1)
        return output.to(x.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        gradient = gradients[0].to(weight.dtype)
        normal = (x.to(weight.dtype) - mean.view(-1, 1, 1)) * inverse.view(-1, 1, 1)
        of_bias = gradient.sum((0, 2, 3))
        of_weight = (gradient * normal).sum((0, 2, 3))
        means = (_summed(of_bias, of_weight) / count).view(2, -1, 1, 1)
        of_x = (gradient - means[0] - normal * means[1]) * (inverse * weight).view(-1, 1, 1)
        return of_x.to(x.dtype), of_weight, of_bias, None
