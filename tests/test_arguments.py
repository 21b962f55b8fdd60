"""What the command line and YAML files may say, and what is answered when they are wrong."""

import json
from pathlib import Path

import pytest

from sgmim_fast.errors import UserError
from sgmim_fast.recipes import RECIPES
from sgmim_fast.train.arguments import config_to_json, load_config, parse_config
from sgmim_fast.train.programs import PRETRAIN


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_its_file(name: str, tmp_path: Path) -> None:
    config, recipe = parse_config(["--recipe", name], PRETRAIN)
    assert recipe == name
    assert config == RECIPES[name]()
    (tmp_path / "config.json").write_text(config_to_json(config, recipe, "pretrain"))
    assert load_config(tmp_path / "config.json", PRETRAIN) == config


def test_options_override_the_file_which_overrides_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: {window_size: 4, image_size: [64, 96]}\n"
        "data: {path: from_file, flip: false}\n"
        "schedule: {epochs: 30, milestones: [10, 20.5]}\n"
        "train: {max_steps: null}\n"
    )
    config, _ = parse_config(
        ["--recipe", "demo", "--config", str(file), "--data", "from_options", "--train.batch_size=3", "--local_rank=1"],
        PRETRAIN,
    )
    assert config.data.path == "from_options"
    assert config.model.window_size == 4
    assert config.model.hw == (64, 96)
    assert config.model.embed_dim == RECIPES["demo"]().model.embed_dim
    assert not config.data.flip
    assert config.schedule.milestones == (10, 20.5)
    assert config.train.batch_size == 3


BAD = [
    (["--recipe", "swin_huge"], "recipe 'swin_huge' is unknown; choose one of swin_base_100ep"),
    (["--train.batchsize", "4"], "did you mean --train.batch-size"),
    (["--train.batch-size", "x"], "--train.batch-size: invalid literal"),
    (["--train.batch-size"], "--train.batch-size"),
    (["--train.batch-size", "0"], "train.batch_size 0 must be 1 or more"),
    (["--data.mask-ratio", "0"], "mask_ratio 0.0 must lie strictly between 0 and 1"),
    (["--data.mask-ratio", "1"], "mask_ratio 1.0 must lie strictly between 0 and 1"),
    (["--data.mask-ratio", "0.99"], "masks all 36 cells"),
    (["--model.image-size", "200"], "image_size 200 must be a multiple of 32"),
    (["--model.encoder", "resnet"], "resnet"),
    (["--train.zero-stage", "0"], "bf16 needs train.zero_stage 1 or more"),
    (["--optimizer.implementation", "lamb"], "lamb"),
    (["--optimizer.implementation", "apex", "--train.zero-stage", "3"], "choose adamw or deepspeed, or a lower stage"),
    (["--train.attention", "flash"], "flash"),
    (["--train.attention", "sdpa", "--train.backend", "reference"], 'what train.backend "reference" computes'),
    (["--compile", "--train.zero-stage", "3"], "use stage 2 or less, or leave --compile out"),
    (["--compile", "--train.attention", "xformers"], "use sdpa, which has the same kernels"),
    (["--compile", "--train.norm", "apex"], "use torch, whose norms the compiler fuses"),
    (["--train.float8", "tensorwise", "--train.precision", "fp32"], "what is not FP8 is bf16; choose both, or neither"),
    (["--compile", "yes"], "yes"),
    (["word"], "word"),
    (["--config", "missing.yaml"], "missing.yaml"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_mistakes_are_named_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(words, PRETRAIN)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "│" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {batchsize: 3}", "--train.batchsize is unknown"),
        ("- a\n- b\n", "must hold a mapping"),
        ("a: [", "is not YAML"),
        ("train: 3", "--train is unknown"),
    ],
)
def test_mistakes_in_a_file_are_named_too(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        parse_config(["--config", str(file)], PRETRAIN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "compiled"),
    [
        (["--compile"], True),
        (["--train.compile"], True),
        (["--compile", "--no-compile"], False),
        (["--train.no-compile"], False),
        ([], False),
    ],
)
def test_compile_has_a_short_name(words: list[str], compiled: bool) -> None:
    assert parse_config(words, PRETRAIN)[0].train.compile is compiled


def test_the_loader_has_a_short_name() -> None:
    assert parse_config(["--loader", "torch"], PRETRAIN)[0].data.loader == "torch"
    with pytest.raises(UserError, match="torch"):
        parse_config(["--loader", "tensorflow"], PRETRAIN)


def test_a_run_of_an_older_version_is_read(tmp_path: Path) -> None:
    """Its file names none of the choices that came later; they are what it ran with."""
    content = json.loads(config_to_json(RECIPES["demo"](), "demo", "pretrain"))
    del content["optimizer"]["implementation"]
    for name in ("attention", "norm", "compile"):
        del content["train"][name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_config(tmp_path / "config.json", PRETRAIN) == RECIPES["demo"]()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"], PRETRAIN)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "deepspeed --num_gpus 2 --module sgmim_fast.pretrain" in text
    assert "swin_base_800ep" in text
    assert "Share of the 32-pixel cells that are masked" in text
    assert "noqa" not in text
    assert "type:" not in text
