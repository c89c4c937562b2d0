"""The step of training before the run: what a network does only in training is found before anything is begun."""

from contextlib import ExitStack

import pytest
import torch
from torch.nn.functional import cross_entropy

from asgd_mpi.config import parse as configuration
from asgd_mpi.config.options import ComputeConfig
from asgd_mpi.errors import ConfigError
from asgd_mpi.optim.step import compute_gradient_
from asgd_mpi.runtime import preflight
from asgd_mpi.runtime.prepare import prepare
from asgd_mpi.task import complete, open_task
from asgd_mpi.vector.flat import FlatModel

RANKS = [{"host": "here", "gpus": []}] * 2


@pytest.mark.parametrize(
    "name, part",
    [
        ("tuple_in_training", "a tuple in training"),
        ("wrong_size_in_training", r"\(2, 3\) in training"),
        ("a_dict", "a dict"),
        (
            "fails_in_training",
            r"KeyError: 'a head that is not there' \(.*small_networks.py, line \d+, in _fails",
        ),
        ("leaves_in_training", "SystemExit: bye"),
        ("detached", "backward pass: RuntimeError"),
        ("whole_numbers", "int64"),
        ("no_arguments", "cannot be made: TypeError"),
        ("squeezed", r"\(10,\) in evaluation for 1 image"),
    ],
)
def test_a_network_that_cannot_be_trained_is_one_line_and_no_run_directory(
    name, part, digits, tmp_path
):
    directory = tmp_path / "run"
    with (
        pytest.raises(ConfigError, match=f"^--model.name small_networks:{name} .*{part}") as caught,
        ExitStack() as hold,
    ):
        prepare(
            [
                "--model",
                f"small_networks:{name}",
                "--data",
                str(digits),
                "--run.dir",
                str(directory),
            ],
            RANKS,
            None,
            hold,
        )
    assert "\n" not in str(caught.value) and not directory.exists()


def test_a_module_that_does_not_compile_is_one_line_with_its_place(digits, tmp_path, monkeypatch):
    (tmp_path / "typo_of_a_user.py").write_text("def net(num_classes:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        pytest.raises(ConfigError, match=r"cannot be made: SyntaxError.*typo_of_a_user.py, line 1"),
        ExitStack() as hold,
    ):
        prepare(
            ["--model", "typo_of_a_user:net", "--data", str(digits), "--dry-run"], RANKS, None, hold
        )


def helped(digits, *options):
    task = open_task(
        complete(
            configuration.parse(
                [
                    "--data",
                    str(digits),
                    "--model",
                    "small_networks:helped",
                    "--data.augment",
                    "none",
                    "--batch-size",
                    "6",
                    *options,
                ]
            )
        )
    )
    return task, preflight.try_out_(task, task.first_module())[1]


def test_parameters_that_get_no_gradient_are_told(digits):
    [note] = helped(digits)[1]
    assert note.startswith("warning: 2 parameters") and "idle.weight, idle.bias" in note


def test_auxiliary_outputs_cannot_be_cut_into_stages_and_that_is_said(digits):
    with pytest.raises(ConfigError, match="--stages.number 2.*auxiliary"):
        helped(digits, "--stages.number", "2")


@pytest.mark.parametrize("parts", [1, 3])
def test_auxiliary_losses_count_with_their_weight_in_micro_batches_too(parts, digits):
    task, _ = helped(digits)
    flat, loader = FlatModel(task.first_module(), torch.device("cpu")), task.train_loader()
    batch = loader.batch(0, 0, 6)
    loader.close()
    loss = compute_gradient_(
        flat, task.objective, batch, 0, compute=ComputeConfig(micro_batches=parts)
    )
    module = task.first_module()
    scores, second, first = module(task.normalise(batch.images))
    whole = cross_entropy(scores, batch.labels) + 0.3 * (
        cross_entropy(second, batch.labels) + cross_entropy(first, batch.labels)
    )
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    for own, theirs in zip(flat.module.parameters(), module.parameters()):
        assert torch.allclose(
            own.grad, torch.zeros_like(own) if theirs.grad is None else theirs.grad, atol=1e-6
        )
