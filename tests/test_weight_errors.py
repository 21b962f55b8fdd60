"""Weights that must be refused, with one clear line and nothing changed: other models, other files, failing disks."""

import os
import pickle
import re
import resource
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weight_cases import ENCODERS, randomised, refuses, refuses_to_load, snapshot, tiny, write_official

from sgmim_fast import UserError, create_model
from sgmim_fast.weights import load_weights, read_config, save_weights, tensors_of

# -- what does not fit


@pytest.mark.parametrize("held", ENCODERS)
@pytest.mark.parametrize("wanted", ENCODERS)
def test_another_architecture_is_named(held: str, wanted: str) -> None:
    if held == wanted:
        model = create_model(tiny(wanted, embed_dim=48))
        said = ["embed_dim 24" if held != "vit" else "embed_dim 32", "embed_dim 48"]
    else:
        model, said = create_model(tiny(wanted)), [f"holds a {held} encoder", f"the model has a {wanted} encoder"]
    state = randomised(tiny(held)).state_dict()
    for strict in (True, False):
        message = refuses_to_load(model, state, *said, strict=strict)
        assert len(message) < 900
    refuses_to_load(model.encoder, state, *said)


def test_another_depth_is_named() -> None:
    state = randomised(tiny("swin", depths=(2, 2, 4, 2))).state_dict()
    model = create_model(tiny("swin"))
    refuses_to_load(model, state, "depths (2, 2, 4, 2)", "depths (2, 2, 2, 2)", "encoder.layers.2.blocks.2")


@pytest.mark.parametrize("encoder,option,change", [("swin", "window_size", 8), ("vit", "image_size", 96)])
def test_another_position_table_names_the_option(encoder: str, option: str, change: int) -> None:
    state = randomised(tiny(encoder, guidance="none", **{option: change})).state_dict()
    message = refuses_to_load(create_model(tiny(encoder, guidance="none")), state, option, "in the model")
    assert "relative_position_bias_table is (" in message


def test_missing_shape_dtype_and_unknown_are_listed() -> None:
    model = create_model(tiny("swin"))
    good = randomised(tiny("swin")).state_dict()
    bad = {key: value for key, value in good.items() if key != "encoder.norm.bias"}
    refuses_to_load(model, bad, "1 missing: encoder.norm.bias")
    refuses_to_load(model, good | {"encoder.norm.bias": torch.zeros(7)}, "encoder.norm.bias is (7,)", "(192,)")
    integers = torch.zeros(192, dtype=torch.int64)
    refuses_to_load(model, good | {"encoder.norm.bias": integers}, "encoder.norm.bias is int64")
    for strict in (True, False):
        extra = good | {"encoder.absolute_pos_embed": torch.zeros(1, 256, 24)}
        refuses_to_load(model, extra, "1 unknown: encoder.absolute_pos_embed", strict=strict)
    both = {f"head.{k}": v for k, v in good.items()}
    refuses_to_load(model, both, "holds no SG-MIM, SimMIM, Swin or timm weights")
    vit = create_model(tiny("vit"))
    norms = {k: v for k, v in vit.encoder.state_dict().items() if k != "mask_token"}
    refuses_to_load(vit.encoder, norms | {"fc_norm.weight": torch.zeros(32)}, "1 unknown: fc_norm.weight")


def test_other_modules_and_other_contents() -> None:
    model = create_model(tiny("vit"))
    refuses(lambda: load_weights(nn.DataParallel(model), model.state_dict()), "DataParallel", "unwrap")
    refuses(lambda: save_weights(nn.Linear(2, 2), "x.safetensors"), "Linear")
    refuses_to_load(model, {}, "no tensors")
    refuses_to_load(model, {"model": {"epoch": 1}}, "no tensors")
    refuses_to_load(model, {**model.state_dict(), "epoch": 1}, "'epoch' is a int")


# -- files that must be refused


class _Payload:
    """Pickles as a call, which an ordinary unpickler makes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", ["system", "open"])
def test_malicious_checkpoint_is_not_run(tmp_path: Path, name: str, protocol: int, zipped: bool) -> None:
    marker = tmp_path / "marker"
    payload = _Payload(os.system, f"touch {marker}") if name == "system" else _Payload(open, str(marker), "w")
    path = tmp_path / "weights.pth"
    content = {"model": snapshot(create_model(tiny("vit"))), "config": payload}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    message = refuses_to_load(create_model(tiny("vit")), path, str(path), *([name] if protocol == 2 else []))
    assert ("could run code" if protocol == 2 else "protocol 4") in message
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the file is what it claims to be
    assert marker.exists()


@pytest.mark.parametrize("where", ["yacs.config", "yacs.elsewhere"])
def test_only_the_configuration_class_of_yacs_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    module = types.ModuleType(where)
    path = tmp_path / "weights.pth"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, where, module)
        kind = type("Other" if where == "yacs.config" else "CfgNode", (dict,), {"__module__": where})
        setattr(module, kind.__name__, kind)
        torch.save({"model": {"encoder.norm.bias": torch.zeros(1)}, "config": kind()}, path)
    refuses_to_load(create_model(tiny("vit")), path, f"{where}.{kind.__name__}")


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model(tiny("vit"))
    state = snapshot(model)
    files = {
        "zip.pth": write_official(tmp_path / "a.pth", state, monkeypatch).read_bytes(),
        "old.pth": write_official(
            tmp_path / "b.pth", state, monkeypatch, _use_new_zipfile_serialization=False
        ).read_bytes(),
        "new.safetensors": save_weights(model, tmp_path / "c.safetensors").read_bytes(),
        "pickle.bin": pickle.dumps({"model": [1, 2]}, protocol=2),
        "text.pt": b"<html>404: not found</html>\n" * 20,
        "text.safetensors": b"<html>404: not found</html>\n" * 20,
    }
    for name, content in files.items():
        path = tmp_path / name
        for size in (1, 7, 100, len(content) // 2, len(content) - 20):
            path.write_bytes(content[:size])
            refuses_to_load(model, path, str(path), "is damaged or not a")
    path.write_bytes(b"")
    refuses_to_load(model, path, "is empty")
    refuses(lambda: read_config(path), "is empty")
    path.write_bytes(content)
    refuses(lambda: read_config(path), "is damaged")


def test_paths_that_are_no_weights(tmp_path: Path) -> None:
    model = create_model(tiny("vit"))
    (tmp_path / "notes.txt").write_text("weights")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "none.pth")
    save_file({}, tmp_path / "none.safetensors")
    refuses_to_load(model, tmp_path, "is a folder")
    refuses_to_load(model, tmp_path / "notes.txt", ".safetensors, .pth, .pt, .bin")
    refuses_to_load(model, tmp_path / "gone.pth", "gone.pth: cannot be read (No such file")
    refuses_to_load(model, tmp_path / "gone.safetensors", "No such file")
    refuses_to_load(model, str(tmp_path / "notes.txt" / "x.pth"), "cannot be read (Not a directory")
    for name in ("list.pth", "none.pth", "none.safetensors"):
        refuses_to_load(model, tmp_path / name, name, "no tensors by name")
    refuses(lambda: read_config(tmp_path / "gone.safetensors"), "No such file")


@pytest.mark.parametrize("text", ["{", '{"encoder": "resnet"}', '{"colour": "red"}', "[]"])
def test_configuration_of_another_version(tmp_path: Path, text: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"norm.bias": torch.zeros(1)}, path, {"layout": "sgmim", "config": text})
    refuses(lambda: read_config(path), str(path), "configuration")


# -- saving that fails


def test_layouts_that_a_model_cannot_have(tmp_path: Path) -> None:
    guided, plain = create_model(tiny("vit")), create_model(tiny("swin", guidance="none"))
    path = tmp_path / "weights.safetensors"
    refuses(lambda: save_weights(guided, path, "onnx"), "'onnx'", "sgmim, simmim, swin, timm")  # type: ignore[arg-type]
    for model, layout, need, others in (
        (plain, "sgmim", "a model with guidance", "'simmim' or 'swin' or 'timm' or 'hf' or 'mim-depth'"),
        (plain.encoder, "sgmim", "a model with guidance", "'swin' or 'timm' or 'hf' or 'mim-depth'"),
        (plain.encoder, "simmim", "the image head", "'swin' or 'timm' or 'hf' or 'mim-depth'"),
        (guided, "swin", "Swin and Swin V2", "'sgmim' or 'simmim' or 'timm' or 'hf'"),
        (guided.encoder, "mim-depth", "Swin and Swin V2", "'timm' or 'hf'"),
    ):
        refuses(
            lambda model=model, layout=layout: save_weights(model, path, layout),  # type: ignore[misc]
            f"layout '{layout}' ", need, f"save this one as {others}",
        )  # fmt: skip
        for other in re.findall(r"'([\w-]+)'", others):
            tensors_of(model, other)
    refuses(lambda: save_weights(guided, tmp_path / "weights.pth"), ".safetensors")
    assert list(tmp_path.iterdir()) == []


def test_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(tiny("swin"))
    path = save_weights(model, tmp_path / "weights.safetensors")
    before = path.read_bytes()
    changed = randomised(tiny("swin"), seed=2)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # writing more fails, as on a full disk
    try:
        with pytest.raises(UserError) as caught:
            save_weights(changed, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in str(caught.value)
    assert "\n" not in str(caught.value)

    def forbidden(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", forbidden)
        refuses(lambda: save_weights(changed, path), "Permission denied")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    save_weights(changed, path)
    assert path.read_bytes() != before


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    model = create_model(tiny("vit"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.safetensors").mkdir()
    for place in ("gone/weights.safetensors", "file/weights.safetensors", "folder.safetensors"):
        refuses(partial(save_weights, model, tmp_path / place), place, "cannot be written")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.safetensors"]
    assert list((tmp_path / "folder.safetensors").iterdir()) == []
