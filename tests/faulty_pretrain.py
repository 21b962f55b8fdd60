"""``python -m tests.faulty_pretrain ...``: pre-training in which one thing goes wrong, for the tests of faults.

SGMIM_TEST_FAULT is JSON: ``{"point": ..., "rank": ..., "step": ...}``. Points of a save kill the process with SIGKILL,
as the out-of-memory killer or a machine's end would: nothing of it gets to clean up.

========== =========================================================================
before     before anything of the checkpoint of ``step`` is written
shard      with a part of this rank's optimizer shard written
written    with all of this rank's files written, before ranks compare notes
rename     with the list of files written, before the folder gets its name
latest     with the folder renamed, before ``latest`` names it
old        with ``latest`` written, before old checkpoints are removed
poison     no kill: the first image of this rank's batches at ``steps`` holds infinity
========== =========================================================================
"""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sgmim_fast import pretrain
from sgmim_fast.train import checkpoint, shard_writer, trainer

PART = 4096  # bytes of a shard


def die(*args: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(point: str, step: int) -> None:
    name = f"step_{step:06d}"
    if point == "before":
        begin = checkpoint.Checkpoints.begin
        checkpoint.Checkpoints.begin = (  # type: ignore[method-assign]
            lambda self, position: die() if position.step == step else begin(self, position)
        )
    elif point == "shard":
        write = shard_writer.ChecksumFile.write

        def write_a_part(self: shard_writer.ChecksumFile, data: Any) -> int:
            done = write(self, data)
            path = Path(self._file.name)
            if name in path.parent.name and "optim_states" in path.name and self._bytes > PART:
                os.truncate(path, PART)
                die()
            return done

        shard_writer.ChecksumFile.write = write_a_part  # type: ignore[method-assign]
    elif point == "written":
        complete = checkpoint.Checkpoints.complete

        def wait_and_die(self: checkpoint.Checkpoints) -> Path:
            if self._begun is not None and self._begun.step == step:
                self._writer.wait()
                die()
            return complete(self)

        checkpoint.Checkpoints.complete = wait_and_die  # type: ignore[method-assign]
    elif point == "rename":
        rename = os.rename
        checkpoint.os.rename = lambda a, b: die() if Path(b).name == name else rename(a, b)  # type: ignore[attr-defined]
    elif point == "latest":
        replace = os.replace

        def replace_unless_latest(a: Any, b: Any) -> None:
            if Path(b).name == "latest" and Path(a).read_text().strip() == name:
                die()
            replace(a, b)

        checkpoint.os.replace = replace_unless_latest  # type: ignore[attr-defined]
    elif point == "old":
        remove_old = checkpoint.remove_old
        checkpoint.remove_old = (  # type: ignore[attr-defined]
            lambda run, now, *rest: die() if now == step else remove_old(run, now, *rest)
        )
    else:
        raise SystemExit(f"no such fault: {point}")


@contextmanager
def poison(steps: list[int]) -> Iterator[None]:
    """Infinity in an image: what a broken augmentation or a bit flip would give."""
    usual = trainer.Trainer.step

    def step(self: trainer.Trainer, number: int, batches: Any, *rest: Any) -> trainer.Step:
        def poisoned() -> Any:
            for batch in batches:
                if number + 1 in steps:
                    batch["image"][0, 0, 0, 0] = float("inf")
                yield batch

        return usual(self, number, poisoned(), *rest)

    trainer.Trainer.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        trainer.Trainer.step = usual  # type: ignore[method-assign]


def main() -> None:
    fault = json.loads(os.environ["SGMIM_TEST_FAULT"])
    mine = int(os.environ["RANK"]) == fault["rank"]
    poisons = mine and fault["point"] == "poison"
    if mine and not poisons:
        kill_in_save(fault["point"], fault["step"])
    with poison(fault["steps"]) if poisons else nullcontext():
        pretrain.main()


if __name__ == "__main__":
    main()
