"""Checkpoints of a run: which are whole, which is the newest, which are removed, and which settings may change."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sgmim_fast.config import ModelConfig, OptimizerConfig, PretrainConfig, TrainConfig
from sgmim_fast.data.order import BEGIN, LoaderState, SampleOrder
from sgmim_fast.errors import UserError
from sgmim_fast.train import retention
from sgmim_fast.train.pretrain_job import PretrainJob
from sgmim_fast.train.resuming import FIXED, FREE, check_same_run, starting_point
from sgmim_fast.train.run_folder import FILES, damage, list_checkpoints, list_files


def write_checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step_{step:06d}"
    (folder / "shards").mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "shards/rank0.pt").write_bytes(bytes(range(256)) * step)
    (folder / FILES).write_text(json.dumps(list_files(folder)))
    return folder


def test_only_whole_checkpoints_are_continued(tmp_path: Path) -> None:
    said: list[str] = []
    steps = [write_checkpoint(tmp_path, step) for step in (100, 200, 1000, 1100, 1200)]
    (tmp_path / "checkpoints/.incomplete-step_001300").mkdir()
    (tmp_path / "checkpoints/step_notes").mkdir()
    assert list_checkpoints(tmp_path) == steps[::-1]
    (steps[4] / "shards/rank0.pt").unlink()
    (steps[3] / "shards/rank0.pt").write_bytes(b"short")
    assert starting_point(tmp_path, "auto", said.append) == steps[2]
    assert [line.split(" is damaged ")[1].split(")")[0] for line in said] == [
        "(shards/rank0.pt is missing",
        f"(shards/rank0.pt has 5 bytes instead of {256 * 1100}",
    ]
    assert starting_point(tmp_path, str(steps[0]), said.append) == steps[0]
    assert starting_point(tmp_path / "new", str(tmp_path), said.append) == steps[2]
    content = bytearray((steps[0] / "shards/rank0.pt").read_bytes())
    content[7] ^= 1
    (steps[0] / "shards/rank0.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"^--resume .*step_000100 is damaged: shards/rank0.pt has other content"):
        starting_point(tmp_path, str(steps[0]), said.append)
    for folder in steps[1:3]:
        (folder / FILES).unlink()
    assert "cannot be read (No such file" in damage(steps[1])
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        starting_point(tmp_path, "auto", said.append)


def test_a_run_is_not_begun_over_another(tmp_path: Path) -> None:
    said: list[str] = []
    assert starting_point(tmp_path, "none", said.append) is None
    assert not said
    assert starting_point(tmp_path, "auto", said.append) is None
    assert said == [f"{tmp_path} has no checkpoint: the run begins anew"]
    write_checkpoint(tmp_path, 5)
    with pytest.raises(UserError, match=r"already holds a run; continue it with --resume auto"):
        starting_point(tmp_path, "none", said.append)


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(1, None, [9]), (2, None, [8, 9]), (1, 3, [3, 6, 9]), (3, 4, [4, 7, 8, 9]), (20, None, None)],
)
def test_old_checkpoints_are_removed(tmp_path: Path, last: int, every: int | None, kept: list[int] | None) -> None:
    for step in range(1, 10):
        write_checkpoint(tmp_path, step)
    retention.remove_old(tmp_path, 9, last, every)
    left = [folder.name for folder in list_checkpoints(tmp_path)[::-1]]
    assert left == [f"step_{step:06d}" for step in kept or range(1, 10)]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_later_damaged_checkpoint_does_not_push_out_the_new_one(tmp_path: Path) -> None:
    """A run that was resumed at 3, before a damaged 9, has just saved 5."""
    for step in (2, 3, 5, 9):
        write_checkpoint(tmp_path, step)
    retention.remove_old(tmp_path, 5, 1, None)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step_000009", "step_000005"]


def test_what_interrupted_saves_left_is_removed(tmp_path: Path) -> None:
    kept = write_checkpoint(tmp_path, 1)
    for name in (".incomplete-step_000002", ".removed-step_000000"):
        (tmp_path / "checkpoints" / name / "shards").mkdir(parents=True)
    retention.clear_leftovers(tmp_path / "checkpoints")
    assert list((tmp_path / "checkpoints").iterdir()) == [kept]


def test_space_is_looked_at_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retention.check_space(tmp_path)
    write_checkpoint(tmp_path, 4)
    retention.check_space(tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(retention.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"it needs 0.00 GB and 0.00 GB are free"):
        retention.check_space(tmp_path)


CONFIG = PretrainConfig()


def loader(**changes: int) -> LoaderState:
    sizes = {"batch_size": 4, "world_size": 2, "accumulation_steps": 1, "seed": 0} | changes
    return SampleOrder(100, **sizes).state(BEGIN, "list")


def settings_of(config: PretrainConfig) -> dict[str, object]:
    fields: dict[str, object] = json.loads(json.dumps(asdict(config)))
    return fields


def check(was: dict[str, object], config: PretrainConfig, here: LoaderState) -> None:
    check_same_run(Path("there"), was, config, (loader(), here), PretrainJob.fixed, PretrainJob.free)


def resume(config: PretrainConfig, **changes: int) -> None:
    check(settings_of(CONFIG), config, loader(**changes))


def test_settings_of_a_resumed_run() -> None:
    resume(CONFIG)
    resume(replace(CONFIG, output="elsewhere", train=TrainConfig(log_every=7, max_steps=3, backend="reference")))
    resume(CONFIG, batch_size=2, accumulation_steps=2)
    resume(CONFIG, batch_size=8, world_size=1)
    for changes, message in (
        ({"batch_size": 8}, "with 8 pairs a step, this run has 16 .* so that their product stays 8"),
        ({"world_size": 1}, "with 8 pairs a step, this run has 4 .1 rank.s. x --train.batch-size 4"),
        ({"seed": 1}, "--train.seed = 0, this run has 1"),
    ):
        with pytest.raises(UserError, match=message):
            resume(CONFIG, **changes)
    faster = replace(CONFIG, optimizer=OptimizerConfig(lr=1.0, weight_decay=0.0))
    with pytest.raises(UserError, match=r"optimizer.lr = 0.0001, this run has 1.0; .*--allow-changes optimizer.lr"):
        resume(faster)
    with pytest.raises(UserError, match=r"optimizer.weight_decay"):
        resume(replace(faster, allow_changes=("optimizer.lr",)))
    resume(replace(faster, allow_changes=("optimizer.lr", "optimizer.weight_decay")))
    with pytest.raises(UserError, match="--allow-changes lr is no setting"):
        resume(replace(faster, allow_changes=("lr",)))
    wider = replace(CONFIG, model=ModelConfig(embed_dim=64), allow_changes=("model.embed_dim",))
    with pytest.raises(UserError, match=r"model.embed_dim = 128, this run has 64; resume with the same settings, or"):
        resume(wider)
    with pytest.raises(UserError, match=r"train.zero_stage = 1, this run has 2"):
        resume(replace(CONFIG, train=TrainConfig(zero_stage=2), allow_changes=("train.zero_stage",)))


def test_another_kind_of_run_is_named() -> None:
    was = {name: value for name, value in settings_of(CONFIG).items() if name != "model"} | {"depth": {"head": "glp"}}
    with pytest.raises(UserError, match=r"another kind of run \(it has settings depth, this run has model\); choose"):
        check(was, CONFIG, loader())


def test_each_optimizer_keeps_its_state_in_its_own_way() -> None:
    other = replace(CONFIG, optimizer=OptimizerConfig(implementation="deepspeed"))
    with pytest.raises(UserError, match=r"optimizer.implementation = adamw, this run has deepspeed; resume with the"):
        resume(other)
    written_before_the_choice = settings_of(CONFIG)
    written_before_the_choice["optimizer"] = {"lr": 1e-4}
    check(written_before_the_choice, other, loader())


def test_every_setting_is_either_compared_or_known_to_be_free() -> None:
    known = {
        f"{group}.{name}" if isinstance(value, dict) else group
        for group, value in settings_of(CONFIG).items()
        for name in (value if isinstance(value, dict) else [""])
    }
    assert known >= FREE | FIXED
    assert not FREE & FIXED
