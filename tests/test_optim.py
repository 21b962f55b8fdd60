"""Schedules against timm's, which SimMIM's recipes are written for; parameter groups by name; whose AdamW."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_apex
import pytest
import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler

from sgmim_fast import ModelConfig, UserError, create_model, nvidia_apex
from sgmim_fast.config import OptimizerConfig, OptimizerName, ScheduleConfig
from sgmim_fast.recipes import RECIPES
from sgmim_fast.train.optim import build_optimizer, check_optimizer, learning_rate, parameter_groups

STEPS = 10  # an epoch


def rates(optimizer: OptimizerConfig, schedule: ScheduleConfig, batch: int) -> list[float]:
    return [learning_rate(step, STEPS, batch, optimizer, schedule) for step in range(schedule.epochs * STEPS)]


def timm_rates(scheduler: CosineLRScheduler | MultiStepLRScheduler, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        scheduler.step_update(step)
        found.append(scheduler.optimizer.param_groups[0]["lr"])
    return found


def test_cosine_is_the_one_of_the_recipes() -> None:
    config = RECIPES["swin_base_100ep"]()
    own = rates(config.optimizer, config.schedule, batch=1024)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2 * config.optimizer.lr)
    peer = CosineLRScheduler(
        optimizer, t_initial=1000, lr_min=2e-5, warmup_lr_init=2e-6, warmup_t=100, cycle_limit=1, t_in_epochs=False
    )
    assert own == pytest.approx(timm_rates(peer, 1000), rel=1e-9)
    assert own[0] == pytest.approx(2e-6)
    assert max(own) < 4e-4


def test_multistep_is_the_one_of_the_recipes() -> None:
    config = RECIPES["swin_base_800ep"]()
    own = rates(config.optimizer, config.schedule, batch=512)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.optimizer.lr)
    peer = MultiStepLRScheduler(
        optimizer,
        decay_t=[7001],  # timm looks one step ahead, SimMIM's own class does not
        decay_rate=0.1,
        warmup_t=100,
        warmup_lr_init=5e-7,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    assert own == pytest.approx(timm_rates(peer, 8000), rel=1e-9)
    assert own[-1] == pytest.approx(1e-5)


@pytest.mark.parametrize("name", ["sgmim_swin_base", "sgmim_swinv2_base", "sgmim_vit_base"])
def test_only_matrices_decay(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    names = {id(p): key for key, p in model.named_parameters()}
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.05))
    assert len(decayed) + len(plain) == len(names)
    words = ("bias", "norm", "token", "gamma", "logit_scale", "cpb_mlp", "absolute_pos")
    assert not [key for key in decayed if any(word in key for word in words)]
    assert not [key for key in plain if not any(word in key for word in words)]
    assert "encoder.patch_embed.proj.weight" in decayed
    assert "depth_encoder.patch_merging_1.reduction.weight" in decayed


def test_position_table_of_the_guidance_does_not_decay() -> None:
    config = ModelConfig(image_size=64, embed_dim=8, depths=(1,) * 4, num_heads=(1,) * 4, guidance="relational-visible")
    groups = parameter_groups(create_model(config), 0.05)
    assert (1, 4, 64) in [tuple(p.shape) for p in groups[1]["params"]]


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """Installs one of the packages of ``fake_apex`` for the length of a test."""

    def install(files: dict[str, str]) -> None:
        monkeypatch.syspath_prepend(fake_apex.write(tmp_path, files))
        fake_apex.forget()

    yield install
    fake_apex.forget()


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def trained(implementation: OptimizerName | None, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Weights of a small model after steps with a rate set anew each time; None is AdamW as torch writes it out."""
    torch.manual_seed(0)
    config = ModelConfig(image_size=64, embed_dim=8, depths=(1,) * 4, num_heads=(1,) * 4)
    model = create_model(config, backend="torch").to(device if torch.cuda.is_available() else CPU, dtype)
    recipe = OptimizerConfig(implementation=implementation or "adamw", betas=(0.8, 0.95), weight_decay=0.3)
    if implementation is None:
        groups = parameter_groups(model, 0.3)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-8, foreach=False)
    else:
        optimizer = build_optimizer(parameter_groups(model, recipe.weight_decay), recipe, device)
    generator = torch.Generator().manual_seed(1)
    for rate in (1e-3, 3e-3, 2e-3):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, dtype=dtype, generator=generator)
            parameter.grad = gradient.to(parameter.device)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def assert_steps_equal(implementation: OptimizerName, device: torch.device, dtype: torch.dtype) -> None:
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    for got, expected in zip(trained(implementation, device, dtype), trained(None, device, dtype), strict=True):
        torch.testing.assert_close(got, expected, rtol=rounding, atol=rounding)


def can_run(implementation: OptimizerName) -> bool:
    try:
        check_optimizer(implementation, GPU)
    except UserError:
        return False
    return torch.cuda.is_available()


def test_fused_adamw_takes_the_steps_of_adamw() -> None:
    assert_steps_equal("adamw", CPU, torch.float64)
    optimizer = build_optimizer(
        parameter_groups(create_model("simmim_vit_base", depths=(1,)), 0.05), OptimizerConfig(), CPU
    )
    assert all(group["fused"] for group in optimizer.param_groups)


def test_apex_is_given_what_makes_its_steps_those_of_adamw(apex: Callable[[dict[str, str]], None]) -> None:
    apex(fake_apex.NVIDIA)
    assert_steps_equal("apex", GPU, torch.float64)


@pytest.mark.skipif(not can_run("apex"), reason="needs NVIDIA Apex and a GPU")
def test_apex_itself() -> None:
    assert_steps_equal("apex", GPU, torch.float32)


@pytest.mark.skipif(not can_run("deepspeed"), reason="needs a GPU and nvcc")
def test_deepspeed_itself() -> None:
    assert_steps_equal("deepspeed", GPU, torch.float32)


def test_apex_that_is_missing_or_another_package_or_broken(
    apex: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia_apex, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"NVIDIA Apex is not installed; build NVIDIA's .*; or choose \"adamw\""):
        check_optimizer("apex", GPU)
    monkeypatch.undo()
    apex(fake_apex.PYPI)  # if it ran, it would end this process
    with pytest.raises(UserError, match=r"PyPI's package of that name, not NVIDIA's; uninstall it"):
        check_optimizer("apex", GPU)
    apex({**fake_apex.NVIDIA, "optimizers/__init__.py": "raise ImportError('undefined symbol: c10\\nmore')"})
    with pytest.raises(UserError, match=r"NVIDIA Apex is installed but fails \(undefined symbol: c10\)"):
        check_optimizer("apex", GPU)
    without = fake_apex.NVIDIA["optimizers/__init__.py"].replace("extensions = True", "extensions = False")
    apex({**fake_apex.NVIDIA, "optimizers/__init__.py": without})
    with pytest.raises(UserError, match="requires cuda extensions"):
        build_optimizer(parameter_groups(torch.nn.Linear(2, 2), 0.05), OptimizerConfig(implementation="apex"), GPU)


def test_apex_on_a_cpu(apex: Callable[[dict[str, str]], None]) -> None:
    apex(fake_apex.NVIDIA)
    with pytest.raises(UserError, match='"apex" cannot run here: its FusedAdam needs a GPU, this run is on the CPU'):
        check_optimizer("apex", CPU)


def test_deepspeeds_own_needs_a_gpu_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match='"deepspeed" cannot run here: its FusedAdam needs a GPU') as caught:
        build_optimizer(parameter_groups(torch.nn.Linear(2, 2), 0.05), OptimizerConfig(implementation="deepspeed"), CPU)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setattr("deepspeed.git_version_info.installed_ops", {})
    with pytest.raises(UserError, match=r"DeepSpeed cannot build it \(.*CUDA_HOME.*\); install nvcc"):
        check_optimizer("deepspeed", GPU)


def test_asking_for_adamw_imports_no_apex(tmp_path: Path) -> None:
    """In a fresh process that could import PyPI's package of that name, which would end it."""
    fake_apex.write(tmp_path, fake_apex.PYPI)
    script = (
        "import sys, torch\n"
        "from sgmim_fast.config import OptimizerConfig\n"
        "from sgmim_fast.models.norms import use_norm\n"
        "from sgmim_fast.train.optim import build_optimizer, parameter_groups\n"
        "model = torch.nn.LayerNorm(2)\n"
        "use_norm(model, 'torch')\n"
        "build_optimizer(parameter_groups(model, 0.05), OptimizerConfig(), torch.device('cpu'))\n"
        "assert 'apex' not in sys.modules\n"
        "from sgmim_fast import nvidia_apex\n"
        "print(nvidia_apex.find())\n"
        "assert 'apex' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "other\n"
