"""Weights & Biases, for who asks for it. The package is imported only then."""

import os
import secrets
import shlex
import string
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from sgmim_fast.config import RunConfig
from sgmim_fast.errors import UserError, first_line
from sgmim_fast.train.sinks import MetricRow, known_curves

RUN_ID = "run_id"
"""File in RUN/wandb with the id that a resumed run continues under."""
_FINISH = 120.0  # seconds for what is still to be sent; it stays in RUN/wandb in any case


def check_wandb(mode: Literal["off", "offline", "online"]) -> None:
    """Refuse Weights & Biases where it is not installed, or not logged in.

    Rank 0 may be asked for a key at a terminal, as `wandb login` asks.

    Raises:
        UserError: with the reason and the remedy.
    """
    if mode == "off":
        return
    wandb = _import(mode)
    if mode == "online" and os.environ.get("RANK", "0") == "0":
        try:
            known = wandb.login(force=True)
        except Exception as error:
            raise _refusal(mode, first_line(error), "run wandb login or set WANDB_API_KEY") from error
        if not known:
            raise _refusal(mode, "no key was given", "run wandb login or set WANDB_API_KEY")


def _import(mode: str) -> Any:
    try:
        import wandb

        wandb.init  # noqa: B018 - of a folder named wandb in the working directory Python makes an empty package
    except Exception as error:
        raise _refusal(mode, f"the package wandb is missing ({first_line(error)})", "pip install wandb") from error
    return wandb


def _refusal(mode: str, reason: str, remedy: str) -> UserError:
    return UserError(f"monitor.wandb {mode} cannot run here: {reason}; {remedy}, or use --monitor.wandb off")


class WandbSink:
    """Rows to a run of Weights & Biases, in ``RUN/wandb`` (offline, without any connection) or to its server.

    Args:
        run: the run's folder, whose name is the name of the W&B run.
        config: becomes its config.
        kind: begins the names of curves.
        first_step: 0 begins a new W&B run; later, the one of ``RUN/wandb/run_id`` goes on.
        say: told where the run is to be seen, and if rows can no longer be taken.

    Raises:
        UserError: if W&B cannot start.
    """

    def __init__(self, run: Path, config: RunConfig, first_step: int, kind: str, say: Callable[[str], None]) -> None:
        monitor, self._kind = config.monitor, kind
        self._wandb, self._say = _import(monitor.wandb), say
        offline = monitor.wandb == "offline"
        settings = self._wandb.Settings(
            mode=monitor.wandb,
            silent=True,
            console="off",  # the run's own output is left alone
            disable_git=True,
            disable_code=True,
            save_code=False,
            symlink=False,
            x_disable_stats=offline,  # their reader asks the cloud which machine this is
            finish_timeout=_FINISH,
            allow_val_change=True,
        )
        try:
            # What is said here first holds for the process: init alone leaves its telemetry looking for a server.
            self._wandb.setup(settings=settings)
            self._run = self._wandb.init(
                project=monitor.wandb_project,
                name=run.resolve().name,
                id=_run_id(run / "wandb" / RUN_ID, anew=first_step == 0),
                dir=str(run),
                config=asdict(config),
                resume=None if offline else "allow",
                settings=settings,
            )
        except Exception as error:
            self._wandb.teardown(exit_code=1)
            raise _refusal(monitor.wandb, first_line(error), "mend that") from error
        folder = Path(self._run.dir).parent
        send = shlex.join(["wandb", "sync", str(folder)])
        say(f"Weights & Biases: {f'{send} sends this run' if offline else self._run.url}")

    def row(self, row: MetricRow) -> None:
        if self._run is None:
            return
        curves = {f"{self._kind}/{name}": value for name, value in known_curves(row)}
        try:
            self._run.log({"epoch": row["epoch"], **curves}, step=row["step"])
        except Exception as error:  # its service is a process of its own, and may end before the run does
            self._say(f"warning: Weights & Biases takes no more rows ({first_line(error)}); metrics.jsonl goes on")
            self._run = None

    def close(self, failed: bool) -> None:
        """Ends W&B's service, too; what could not be sent by then stays in RUN/wandb."""
        try:
            if self._run is not None:
                self._run.finish(exit_code=int(failed))
            self._wandb.teardown(exit_code=int(failed))
        except Exception as error:
            if self._run is None:  # said already
                return
            self._say(f"warning: Weights & Biases did not end well ({first_line(error)}); metrics.jsonl is complete")


def _run_id(path: Path, anew: bool) -> str:
    """That of the run's folder; a new one is kept there."""
    if not anew and path.is_file() and (found := path.read_text().strip()):
        return found
    made = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(made + "\n")
    os.replace(temporary, path)
    return made
