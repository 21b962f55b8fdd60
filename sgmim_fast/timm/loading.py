"""Weights of other layouts in timm's own ways of loading."""

from typing import Any

from timm.models import adapt_input_conv

from sgmim_fast.errors import UserError
from sgmim_fast.weight_plan import some
from sgmim_fast.weights import load_weights


def translate_names(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: bring the names of other layouts to the model's.

    Without a classifier there, as in pre-training, the model's own stays as it is.

    Raises:
        UserError: if other parameters are missing, or do not fit.
    """
    own = model.state_dict()
    given = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if all(key in own and own[key].shape == value.shape for key, value in given.items()):
        return
    classifier = {key: value for key, value in given.items() if key.startswith("head.")}
    weights = {key: value for key, value in given.items() if key not in classifier}
    for key, value in weights.items():
        if key.endswith("patch_embed.proj.weight") and value.shape[1] != model.in_chans:
            weights[key] = adapt_input_conv(model.in_chans, value)
    report = load_weights(model, weights, strict=False, resize=True)
    if missing := [name for name in report.missing if not name.startswith("head.")]:
        # Said here: timm does not ask for all where the classifier is another.
        raise UserError(f"state dict: {len(missing)} missing: {some(missing)}; build the model like the file's")
    for key in given:
        del state[prefix + key]
    state |= {prefix + name: value for name, value in own.items()}
    for key, value in classifier.items():
        if (name := _classifier_name(model, key)) in own:
            state[prefix + name] = value


def _classifier_name(model: Any, key: str) -> str:
    """The model's name of a classifier's weight or bias, which official Swin calls ``head`` and timm's ``head.fc``."""
    leaf = key.rpartition(".")[2]
    return f"head.fc.{leaf}" if model.container == "layers" else f"head.{leaf}"


def name_classifier(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """So named, timm finds the classifier where it is to leave it out."""
    return {_classifier_name(model, key) if key.startswith("head.") else key: state[key] for key in state}


def name_wrapped(net: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded into a net of features: names of the model within it are put where that one is.

    Without this timm's ``checkpoint_path`` would read no weights but those of such a net.
    """
    inner = f"{prefix}model."
    own = {inner + name for name in net.model.state_dict()}
    given = [key for key in state if key.startswith(prefix)]
    if given and not own.issuperset(given):
        for key in given:
            state[inner + key.removeprefix(prefix)] = state.pop(key)
