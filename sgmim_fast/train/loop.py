"""The training loop: steps, and what happens between them."""

import time
from dataclasses import replace

from sgmim_fast.data.batches import Loader
from sgmim_fast.train.agreement import Agreement
from sgmim_fast.train.anomalies import SkippedSteps
from sgmim_fast.train.checkpoint import Checkpoints
from sgmim_fast.train.metrics import LossWindow, Stopwatch, as_float, memory
from sgmim_fast.train.profiling import StepProfiler
from sgmim_fast.train.reporting import Reporter
from sgmim_fast.train.stopping import StopRequest
from sgmim_fast.train.trainer import Step, Trainer
from sgmim_fast.train.watchdog import Watchdog


class Loop:
    """Takes a trainer from its position to the last step, with metric rows and checkpoints on the way.

    Every rank makes one; what they decide between steps they decide together.
    """

    def __init__(
        self,
        trainer: Trainer,
        loader: Loader,
        reporter: Reporter,
        agreement: Agreement,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self._trainer, self._loader, self._reporter = trainer, loader, reporter
        self._agreement, self._stop, self._watchdog = agreement, stop, watchdog
        config, position = trainer.config, trainer.position
        self._start, self._begin = position.step, position.loader.place
        self._logged = position.step
        self._losses, self._watch = LossWindow(trainer.job.losses, trainer.device), Stopwatch()
        self._profiler = StepProfiler(
            trainer.run, config.monitor.profile_steps, trainer.rank, trainer.device, reporter.say
        )
        self._skipped = SkippedSteps(
            trainer.run,
            agreement,
            position.skipped_steps,
            config.fault.max_skipped_steps,
            trainer.job.sources,
            reporter.say,
        )
        self._checkpoints = Checkpoints(
            trainer.engine,
            trainer.job.model(trainer.task),
            trainer.job.save,
            trainer.run,
            agreement,
            beside=config.train.async_checkpoint,
            say=reporter.say,
        )

    def run(self, total: int, *, evaluate_first: bool = False) -> bool:
        """All steps up to ``total``; False if a rank was asked to stop before, once its last step is saved.

        Args:
            evaluate_first: the run that wrote the checkpoint was stopped in the evaluation that follows its step.
        """
        self._reporter.say(f"{self._trainer.summary(total)}; {self._reporter.summary()}")
        if warning := self._profiler.warning(total):
            self._reporter.say(warning)
        try:
            if evaluate_first and not self._evaluate(self._start):
                return False
            return self._steps(total)
        finally:
            self._checkpoints.close()

    def _steps(self, total: int) -> bool:
        batches, log_every = iter(self._loader), self._trainer.config.train.log_every
        evaluated = True
        for number in range(self._start, total):
            step = self._trainer.step(number, batches, self._profiler, self._watchdog.beat)
            done = number + 1
            self._note(step, done)
            if done % log_every == 0 or done == total:
                self._report(step, done)
            self._reporter.step(done)
            if self._trainer.job.evaluates_after(done, total, self._trainer.order):
                evaluated = self._evaluate(done)
            if self._between_steps(done, total):
                return False
        return evaluated

    def _note(self, step: Step, done: int) -> None:
        self._watch.waited(step.waited)
        for micro in step.micro_steps:
            self._losses.add(micro.out)
        if step.taken:
            self._skipped.taken()
        else:
            self._skipped.skipped(done, done / self._trainer.order.steps_per_epoch, step.micro_steps)

    def _report(self, step: Step, done: int) -> None:
        order = self._trainer.order
        losses = self._losses.over_ranks(self._loader.substitutes.count)
        self._reporter.row(
            {
                "step": done,
                "epoch": done / order.steps_per_epoch,
                **losses,
                "lr": step.rate,
                "grad_norm": as_float(step.norm) if step.taken else None,
                **self._watch.lap((done - self._logged) * order.step_size),
                "skipped_steps": self._skipped.count,
                **memory(self._trainer.device),
            }
        )
        self._logged = done

    def _evaluate(self, done: int) -> bool:
        """False if the run was asked to stop meanwhile."""
        trainer = self._trainer
        self._watchdog.beat(f"evaluating after step {done}")
        before = time.perf_counter()
        found = trainer.job.evaluate(
            trainer.task, trainer.device, self._watchdog.beat, lambda: self._agreement.any([self._stop.here])[0]
        )
        if found is None:
            self._reporter.say(f"the evaluation after step {done} is put off")
            return False
        self._reporter.evaluation({"step": done, "epoch": done / trainer.order.steps_per_epoch, **found})
        self._watch.leave_out(time.perf_counter() - before)
        return True

    def _between_steps(self, done: int, total: int) -> bool:
        """Whether to stop here; saves what is due, and finishes what was begun before."""
        train, checkpoints = self._trainer.config.train, self._checkpoints
        stopping, writing = self._agreement.any([self._stop.here, checkpoints.busy])
        stopping = stopping and done < total
        if checkpoints.open and not writing:
            checkpoints.complete()
        if done % train.checkpoint_every and done < total and not stopping:
            return False
        self._watchdog.beat(f"saving step {done}")
        trainer = self._trainer
        place = trainer.order.advance(self._begin, done - self._start)
        checkpoints.begin(
            replace(
                trainer.position,
                step=done,
                loader=trainer.order.state(place, trainer.job.sha256),
                skipped_steps=self._skipped.count,
            )
        )
        if stopping or done == total or not train.async_checkpoint:
            checkpoints.complete()
        return stopping
