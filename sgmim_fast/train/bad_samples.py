"""Where a run names the pairs that it could not use."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sgmim_fast.data.substitution import BadSample


@dataclass
class BadSampleLog:
    """Appends to ``bad_samples.jsonl`` of the run and tells the reader; loaders call it, from any thread.

    Lines are shorter than what the system appends in one piece, so ranks of one machine may share the file.
    """

    run: Path
    rank: int
    say: Callable[[str], None] | None = None
    """Where lines go beside a progress bar; None for the error stream."""

    def __call__(self, bad: BadSample) -> None:
        self.run.mkdir(parents=True, exist_ok=True)  # rank 0 may not have come so far
        with (self.run / "bad_samples.jsonl").open("a") as file:
            file.write(json.dumps({"rank": self.rank, **bad._asdict()}) + "\n")
        line = f"warning: {bad.reason}; pair {bad.substitute} stands in for pair {bad.sample}"
        if self.say is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self.say(line)
