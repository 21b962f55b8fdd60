"""Scores of the two sets of test scenes, counted apart in one pass."""

from collections.abc import Callable, Mapping

from torch import Tensor

from benchmarks.replicating.scenes import FAMILIAR, TEST, set_of
from sgmim_fast.data.dense.evaluation import EvaluationSample
from sgmim_fast.probing.targets import ClassTarget, DepthTarget, Scores

TEST_SETS = (TEST, FAMILIAR)


def flat(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Figures by set as one: those of ``TEST`` under their own names, others with the set's name before them."""
    prefixes = {name: "" if name == TEST else f"{name} " for name in figures}
    return {prefixes[name] + key: value for name, found in figures.items() for key, value in found.items()}


class _ScoresOfSets(Scores):
    def __init__(self, make: Callable[[], Scores]) -> None:
        self.sets = {name: make() for name in TEST_SETS}

    def update(self, prediction: Tensor, sample: EvaluationSample) -> None:
        self.sets[set_of(sample.name)].update(prediction, sample)

    def compute(self) -> dict[str, float]:
        return flat({name: scores.compute() for name, scores in self.sets.items()})


class DepthOfSets(DepthTarget):
    """Depth, scored by sets."""

    def scores(self) -> Scores:
        return _ScoresOfSets(super().scores)


class ClassesOfSets(ClassTarget):
    """Classes, scored by sets."""

    def scores(self) -> Scores:
        return _ScoresOfSets(super().scores)
