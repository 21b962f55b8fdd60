"""Real DeepSpeed runs of a tiny model on CPU ranks: equal numbers of ranks, resume, faults, bad input."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from training_runs import (
    arguments,
    command,
    free_port,
    kill_after_a_checkpoint,
    refuse,
    rows,
    run,
    same_course,
    succeed,
    train,
    weights,
)


def test_a_run_leaves_what_it_promises(two_ranks: Path) -> None:
    assert (two_ranks / "checkpoints" / "latest").read_text().strip() == "step_000006"
    assert not list((two_ranks / "checkpoints").glob(".incomplete*"))
    assert [row["step"] for row in rows(two_ranks)] == [1, 2, 3, 4, 5, 6]
    assert set(rows(two_ranks)[0]) >= {
        "step", "epoch", "loss", "image_loss", "structure_loss", "lr", "grad_norm", "images_per_second", "data_wait",
        "peak_memory_bytes", "tflops", "mfu", "skipped_steps",
    }  # fmt: skip
    for row in rows(two_ranks):
        assert row["loss"] == pytest.approx(row["image_loss"] + row["structure_loss"], rel=1e-6)
        assert row["grad_norm"] > 0
        assert 0 <= row["data_wait"] <= 1
        assert row["tflops"] > 0
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.5)
    assert json.loads((two_ranks / "environment.json").read_text())["world_size"] == 2
    assert list((two_ranks / "tensorboard").iterdir())
    assert len(list((two_ranks / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert sorted(path.name for path in (two_ranks / "profile").iterdir()) == [
        f"step_000002_rank{rank}.{kind}" for rank in (0, 1) for kind in ("json.gz", "txt")
    ]
    with gzip.open(two_ranks / "profile" / "step_000002_rank1.json.gz") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert {"step 2", "data", "forward", "backward", "optimizer"} <= names
    assert all(value.dtype == torch.float32 for value in weights(two_ranks, 6).values())


@pytest.mark.parametrize(("batch", "micro_steps"), [(4, 1), (2, 2)], ids=["twice-the-batch", "two-micro-steps"])
def test_one_rank_with_as_many_pairs_gives_the_same_run(
    batch: int, micro_steps: int, two_ranks: Path, pairs: Path, tmp_path: Path
) -> None:
    """Started by torchrun, so that launcher is tried too."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "1",
        "--master-port",
        str(free_port()),
    ]
    options = {"train__batch_size": batch, "train__accumulation_steps": micro_steps}
    succeed(run([*torchrun, "-m", "sgmim_fast.pretrain", *arguments(pairs, tmp_path / "one", **options)]))
    for one, two in zip(rows(tmp_path / "one"), rows(two_ranks), strict=True):
        for name in ("loss", "image_loss", "structure_loss", "lr", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=2e-5), (name, one["step"])
    for name, value in weights(two_ranks, 6).items():
        torch.testing.assert_close(weights(tmp_path / "one", 6)[name], value, rtol=1e-3, atol=2e-6, msg=name)


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(two_ranks: Path, pairs: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(two_ranks, broken)
    shutil.rmtree(broken / "checkpoints" / "step_000006")
    (broken / "checkpoints" / "latest").write_text("step_000003\n")
    kept = rows(broken)[:3]
    (broken / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))

    succeed(train(2, [*arguments(pairs, broken), "--resume", "auto"]))

    same_course(broken, two_ranks)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_run_killed_within_an_epoch_sees_the_same_batches_again(
    loader: str, two_ranks: Path, pairs: Path, tmp_path: Path
) -> None:
    """Both ranks and the launcher are killed while they train, then go on with the very losses of the other run."""
    for attempt in range(3):  # a busy machine may let it end before it is killed
        output = tmp_path / f"run{attempt}"
        words = arguments(pairs, output, data__loader=loader, data__workers=1, train__checkpoint_every=2)
        kill_after_a_checkpoint(command(2, words), output / "checkpoints" / "latest")
        latest = (output / "checkpoints" / "latest").read_text().strip()
        if latest != "step_000006":
            break
    assert latest in ("step_000002", "step_000004"), "killed within the epoch of six steps"
    state = json.loads((output / "checkpoints" / latest / "state.json").read_text())
    assert state["loader"] == {
        **{"epoch": 0, "taken": 4 * state["step"], "pairs": state["loader"]["pairs"], "seed": 0, "shuffle_buffer": 0},
        **{"batch_size": 2, "accumulation_steps": 1, "world_size": 2},
    }
    out = succeed(train(2, [*words, "--resume", "auto"]))
    assert f"24 pairs through {loader}" in out
    same_course(output, two_ranks)


def test_a_save_that_fails_leaves_the_checkpoint_before_it(two_ranks: Path, pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "full"
    shutil.copytree(two_ranks, output)
    before = weights(output, 6)
    words = [*arguments(pairs, output, train__max_steps=7), "--resume", "auto"]
    largest = max(p.stat().st_size for p in (output / "checkpoints" / "step_000006").iterdir())
    done = train(2, words, file_limit=largest // 1024 // 2)
    assert done.returncode != 0
    line = next(line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert "step_000007" in line
    assert "step_000006 is intact" in line
    assert (output / "checkpoints" / "latest").read_text().strip() == "step_000006"
    assert not (output / "checkpoints" / "step_000007").exists()
    assert all(torch.equal(value, before[name]) for name, value in weights(output, 6).items())


def test_a_broken_image_stops_all_ranks_with_its_name(pairs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    broken = data / "images" / "07.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    done = train(2, arguments(data, tmp_path / "run", data__workers=1))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    assert "07.jpg" in lines[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()

    shutil.copy(pairs / "images" / "07.jpg", broken)  # mended, the same command works
    left = (tmp_path / "run" / "metrics.jsonl").read_text()
    succeed(train(2, arguments(data, tmp_path / "run", data__workers=1, train__max_steps=1)))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / "metrics.jsonl.1").read_text() == left


def test_a_broken_image_is_replaced_and_named(pairs: Path, tmp_path: Path) -> None:
    """One epoch of six steps meets each pair once."""
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    broken = data / "images" / "07.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    done = train(2, [*arguments(data, tmp_path / "run", data__workers=1), "--data.max-bad-share", "0.1"])
    succeed(done)
    lines = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    (bad,) = map(json.loads, lines)
    assert (bad["epoch"], bad["sample"]) == (0, 7)
    assert bad["substitute"] != 7
    assert "07.jpg: cannot be read" in bad["reason"]
    told = [line for line in (done.stdout + done.stderr).splitlines() if "07.jpg" in line]
    assert len(told) == 1
    assert told[0].startswith("warning: ")
    assert told[0].endswith(f"pair {bad['substitute']} stands in for pair 7")
    counts = [row["bad_samples"] for row in rows(tmp_path / "run")]
    assert counts[-1] == 1
    assert counts == sorted(counts)


def test_a_data_set_smaller_than_a_step(pairs: Path, tmp_path: Path) -> None:
    refuse(arguments(pairs, tmp_path / "run", train__batch_size=64), "lower --train.batch-size")


def test_a_folder_that_cannot_be_written(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refuse(arguments(pairs, tmp_path / "file" / "run"), "file")


def test_a_finished_run_is_not_overwritten(two_ranks: Path, pairs: Path) -> None:
    refuse(arguments(pairs, two_ranks), "already holds a run; continue it with --resume auto")


def test_resuming_a_finished_run_changes_nothing(two_ranks: Path, pairs: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in two_ranks.rglob("*") if path.is_file()}
    out = succeed(train(2, [*arguments(pairs, two_ranks), "--resume", "auto"]))
    assert "has done all 6 steps" in out
    assert {path: path.stat().st_mtime_ns for path in two_ranks.rglob("*") if path.is_file()} == before


def test_resume_where_there_is_nothing_to_resume(pairs: Path, tmp_path: Path) -> None:
    """A job that is queued with --resume auto begins anew; a path that is none is an error."""
    out = succeed(train(1, [*arguments(pairs, tmp_path / "none", train__max_steps=1), "--resume", "auto"]))
    assert "has no checkpoint: the run begins anew" in out
    refuse([*arguments(pairs, tmp_path / "other"), "--resume", str(pairs)], "neither a checkpoint nor a run")


def test_resume_with_another_model_names_what_differs(two_ranks: Path, pairs: Path) -> None:
    words = arguments(pairs, two_ranks, model__embed_dim=32, train__max_steps=9, train__batch_size=4)
    refuse([*words, "--resume", "auto"], "model.embed_dim = 16, this run has 32")


def test_changed_mathematics_must_be_named(two_ranks: Path, pairs: Path, tmp_path: Path) -> None:
    """Another learning rate is refused, then allowed; the run goes on in a folder of its own."""
    words = [*arguments(pairs, tmp_path / "run", train__max_steps=7), "--resume", str(two_ranks)]
    changed = [*words, "--optimizer.lr", "0.5"]
    done = train(2, changed)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "optimizer.lr = 0.016, this run has 0.5" in errors[0]
    assert "--allow-changes optimizer.lr" in errors[0]
    succeed(train(2, [*changed, "--allow-changes", "optimizer.lr"]))
    assert [row["step"] for row in rows(tmp_path / "run")] == [7]


def test_a_damaged_checkpoint_is_passed_over(two_ranks: Path, pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(two_ranks, output)
    shards = output / "checkpoints" / "step_000006" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(shards.read_bytes())
    content[len(content) // 2] ^= 1
    shards.write_bytes(content)
    out = succeed(train(2, [*arguments(pairs, output), "--resume", "auto"]))
    assert "step_000006 is damaged (zero_pp_rank_1_mp_rank_00_optim_states.pt has other content" in out
    assert "from step 3" in out
    superseded = (output / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in superseded] == rows(two_ranks)[3:]
    for name, value in weights(two_ranks, 6).items():
        assert torch.equal(weights(output, 6)[name], value), name


def test_another_number_of_pairs_a_step_is_refused(two_ranks: Path, pairs: Path) -> None:
    refuse(
        [*arguments(pairs, two_ranks, train__max_steps=9), "--resume", "auto"],
        "with 4 pairs a step, this run has 2 (1 rank(s) x --train.batch-size 2 x --train.accumulation-steps 1)",
    )
