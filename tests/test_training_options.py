"""Real runs with another attention and with ``--compile``; what is asked for and cannot run stops them first."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_run import make_pairs
from training_runs import arguments, refuse, rows, succeed, train

# Few operations: each of them is a program to build when the step is compiled.
SMALL = {
    "model__encoder": "vit",
    "model__patch_size": "16",
    "model__embed_dim": "16",
    "model__depths": "1",
    "model__num_heads": "2",
    "model__guidance": "none",
    "train__max_steps": "2",
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("options") / "pairs", count=8)


@pytest.fixture(scope="module")
def one_rank(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with nothing chosen."""
    output = tmp_path_factory.mktemp("one_rank") / "run"
    succeed(train(1, arguments(pairs, output, **SMALL)))
    return output


def assert_same_losses(run: Path, other: Path) -> None:
    assert len(rows(run)) == 2
    for got, expected in zip(rows(run), rows(other), strict=True):
        for name in ("loss", "image_loss", "lr", "grad_norm"):
            assert got[name] == pytest.approx(expected[name], rel=1e-5), (name, got["step"])


def test_a_compiled_run_has_the_losses_of_the_eager_one(one_rank: Path, pairs: Path, tmp_path: Path) -> None:
    out = succeed(train(1, [*arguments(pairs, tmp_path / "run", **SMALL), "--compile"]))
    assert "ZeRO 1, compiled; 2 steps" in out
    assert_same_losses(tmp_path / "run", one_rank)


def test_so_has_one_on_two_ranks(pairs: Path, tmp_path: Path) -> None:
    for name, words in (("eager", []), ("compiled", ["--compile"])):
        succeed(train(2, [*arguments(pairs, tmp_path / name, **SMALL, train__zero_stage=2), *words]))
    assert_same_losses(tmp_path / "compiled", tmp_path / "eager")


def test_so_has_one_with_another_attention(one_rank: Path, pairs: Path, tmp_path: Path) -> None:
    succeed(train(1, arguments(pairs, tmp_path / "run", **SMALL, train__attention="sdpa")))
    assert_same_losses(tmp_path / "run", one_rank)


def test_products_in_fp8_train_as_those_in_bf16(pairs: Path, tmp_path: Path) -> None:
    """Two ranks, partitioned gradients; the checkpoint is one like any other, and knows how it was trained."""
    bf16 = {**SMALL, "train__precision": "bf16", "train__zero_stage": 2}
    for name in ("off", "tensorwise"):
        succeed(train(2, arguments(pairs, tmp_path / name, **bf16, train__float8=name)))
    fp8, plain = rows(tmp_path / "tensorwise"), rows(tmp_path / "off")
    assert len(fp8) == len(plain) == 2
    for got, expected in zip(fp8, plain, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-2)
    assert [row["grad_norm"] for row in fp8] != [row["grad_norm"] for row in plain]
    weights = [
        load_file(tmp_path / name / "checkpoints/step_000002/model.safetensors") for name in ("off", "tensorwise")
    ]
    assert weights[0].keys() == weights[1].keys()
    changed = {**bf16, "train__float8": "rowwise", "train__batch_size": 4}  # one rank takes what two took
    refuse(
        arguments(pairs, tmp_path / "tensorwise", **changed, resume="auto"),
        "was written with train.float8 = tensorwise, this run has rowwise",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train__attention": "xformers"}, 'attention "xformers" cannot run here: it needs a GPU'),
        ({"train__norm": "apex"}, 'norm "apex" cannot run here'),
        ({"optimizer__implementation": "apex"}, 'optimizer.implementation "apex" cannot run here'),
        ({"optimizer__implementation": "deepspeed"}, "its FusedAdam needs a GPU"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_run_stops_a_run_before_it_starts(
    options: dict[str, str], message: str, pairs: Path, tmp_path: Path
) -> None:
    refuse(arguments(pairs, tmp_path / "run", **SMALL, **options), message)
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_stops_a_run_before_it_starts(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    refuse([*arguments(pairs, tmp_path / "run", **SMALL), "--compile"], "--compile cannot run here: no C++ compiler")
    assert not list(tmp_path.iterdir())
