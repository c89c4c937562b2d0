"""Weights out of files of other trainers are found, named as the network names them, and said."""

import pytest
import torch
from torch import nn

from asgd_mpi.errors import ConfigError
from asgd_mpi.model.networks import digits_cnn
from asgd_mpi.model.weights import load_weights_


class Wrapped(nn.Module):
    """Has a part of its own that is called as a wrapper calls its."""

    def __init__(self):
        super().__init__()
        self.module, self.head = nn.Linear(3, 4), nn.Linear(4, 2)


def saved(tmp_path, held):
    torch.save(held, tmp_path / "file.pt")
    return str(tmp_path / "file.pt")


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def inside(state):
    """As torch's examples save AlexNet, whose `features` alone are parallel."""
    return {
        name.replace("0.", "0.module.", 1) if name.startswith("0.") else name: tensor
        for name, tensor in state.items()
    }


WAYS = {
    "ddp": (lambda state: prefixed(state, "module."), ["without module. in its names"]),
    "compiled": (lambda state: prefixed(state, "_orig_mod."), ["without _orig_mod. in its names"]),
    "compiled ddp": (
        lambda state: prefixed(state, "_orig_mod.module."),
        ["without module. and _orig_mod. in its names"],
    ),
    "ddp of compiled": (
        lambda state: prefixed(state, "module._orig_mod."),
        ["without module. and _orig_mod. in its names"],
    ),
    "a part": (inside, ["without module. in its names"]),
    "lightning": (
        lambda state: {"state_dict": prefixed(state, "model."), "epoch": 3},
        ["from its 'state_dict'", "without model."],
    ),
    "lightning of ddp": (
        lambda state: {"state_dict": prefixed(state, "net.module.")},
        ["without net. and module."],
    ),
    "model": (
        lambda state: {
            "model": state,
            "epoch": 3,
            "optimizer": {"state": {0: {"step": torch.ones(())}}},
        },
        ["its 'model'"],
    ),
    "nested": (
        lambda state: {"a": {"model_state_dict": prefixed(state, "module.")}},
        ["its 'a.model_state_dict', without module."],
    ),
    "beside an average": (
        lambda state: {"net": state, "ema": {name: 0 * tensor for name, tensor in state.items()}},
        ["its 'net'"],
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_taken_however_another_trainer_has_wrapped_them(tmp_path, way):
    wrap, told = WAYS[way]
    state, fresh, said = digits_cnn(10, 1).state_dict(), digits_cnn(10, 1), []
    assert load_weights_(fresh, saved(tmp_path, wrap(state)), note=said.append) == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items())
    [text] = said
    assert all(part in text for part in told)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_part_of_the_network_that_is_called_like_a_wrapper_keeps_its_name(tmp_path, prefix):
    state, fresh = Wrapped().state_dict(), Wrapped()
    assert load_weights_(fresh, saved(tmp_path, prefixed(state, prefix))) == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items())


def test_what_does_not_fit_is_shown_in_the_files_names_beside_the_networks(tmp_path):
    other = {f"backbone.{name}": tensor for name, tensor in digits_cnn(10, 1).state_dict().items()}
    other["teacher"] = torch.zeros(3)
    with pytest.raises(
        ConfigError,
        match=r"8 names are missing, 9 are not the network's.*the file's backbone.0.weight.*beside the network's 0.weight",
    ):
        load_weights_(digits_cnn(10, 1), saved(tmp_path, other))
    with pytest.raises(
        ConfigError,
        match=r"such as the file's stem.weight, stem.bias, beside the network's 0.weight, 0.bias, 2.weight and",
    ):
        load_weights_(
            digits_cnn(10, 1),
            saved(tmp_path, {"net": {"stem.weight": torch.ones(2), "stem.bias": torch.ones(2)}}),
        )
    with pytest.raises(ConfigError, match="holds no tensors by name, but epoch, args"):
        load_weights_(digits_cnn(10, 1), saved(tmp_path, {"epoch": 3, "args": "x"}))


def test_what_is_left_out_of_weights_that_fit_in_part_is_said(tmp_path):
    said = []
    path = saved(tmp_path, {"model": {**digits_cnn(7, 1).state_dict(), "extra": torch.ones(1)}})
    assert load_weights_(digits_cnn(10, 1), path, partial=True, note=said.append) == [
        "9.weight",
        "9.bias",
    ]
    assert [text.partition(": ")[2] for text in said] == [
        "taken from its 'model'",
        "2 of the network's names are not in it, and begin as without it: 9.weight, 9.bias",
        "3 of its names are left out: 9.weight, 9.bias, extra",
    ]
