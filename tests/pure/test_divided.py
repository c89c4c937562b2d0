"""A task of a user's own that is cut into stages, in one process: its gradients, and what of a task cannot be cut."""

import dataclasses
import itertools
import sys
from contextlib import ExitStack

import pytest
import torch
from staged import staged_gradient_

import asgd_mpi
import staged_tasks
from asgd_mpi.config.options import Config
from asgd_mpi.errors import ConfigError
from asgd_mpi.optim.divided import Divided
from asgd_mpi.optim.step import compute_gradient_
from asgd_mpi.pipeline.cut import cut
from asgd_mpi.pipeline.plan import measure
from asgd_mpi.pipeline.schedule import SCHEDULES
from asgd_mpi.runtime.prepare import prepare
from asgd_mpi.task import complete, open_task
from asgd_mpi.task.loop import Loop, options_of
from asgd_mpi.task.own import find, with_options
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.packed import pack, unpack

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def opened(name):
    own = find(f"staged_tasks:{name}")
    config = with_options(Config(), own)
    config.data.source, config.model.name = "task", f"staged_tasks:{name}"
    return open_task(complete(config), own=own)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stages_have_the_gradients_of_a_whole_task_to_the_bit(precision):
    """With dropout, batch norm, parts of unequal size, and two tensors that cross a cut."""
    task = opened("Words")
    task.config.compute.precision = precision
    compute, loader = task.config.compute, task.train_loader()
    batch = loader.batch(0, 16, 32)
    loader.close()
    plain = FlatModel(task.build_module(), CPU)
    loss = compute_gradient_(plain, task.objective, batch, 3, compute=compute)
    assert plain.gradient.isfinite().all() and plain.gradient.any()
    for num_stages, schedule in itertools.product([2, 3, 4], SCHEDULES.values()):
        flat = FlatModel(task.build_module(), CPU)
        plan = task.stage_plan(flat.module)
        cuts = plan.cuts_by("memory", num_stages)
        stages = cut(plan.graph, cuts)
        assert len(stages) == num_stages and plan.graph.sample.dtype == torch.int64
        found = staged_gradient_(flat, task.divided, batch, 3, compute, stages, schedule)
        assert found == loss and torch.equal(flat.gradient, plain.gradient)
        assert all(torch.equal(one, other) for one, other in zip(flat.statistics, plain.statistics))


def test_each_node_of_a_task_is_measured_on_its_own_samples():
    task = opened("Words")
    graph = task.stage_plan(task.build_module()).graph
    assert graph.sample.tolist() == task.trial(6)["seen"].flip(1).tolist()
    assert all(each.forward > 0 for each in measure(graph, graph.sample, repeats=1))


def test_the_last_stage_gets_the_batch_that_the_first_one_has_read():
    task = opened("Words")
    batch = task.trial_batch(5)
    words, tensors = task.divided.share(batch)
    _, arrived = unpack(pack(0, tensors, {}), CPU)
    found = task.divided.prepare((words, arrived), 5, 0, 0, CPU)
    assert list(found) == ["seen", "next"] and isinstance(found["next"], list)
    assert found["next"][1] == ("text",) * 5 and found["seen"].dtype == torch.int64
    assert torch.equal(found["seen"], batch.data["seen"])


@pytest.mark.parametrize(
    ("name", "unread"),
    [("Words", ["/seen"]), ("Restored", []), ("Weighed", ["/spare"]), ("Listed", ["/1"])],
)
def test_what_the_last_stage_does_not_read_stays_with_the_first_one(
    tmp_path, monkeypatch, name, unread
):
    """A tensor without numbers stands for it there: the loss has the same value, or fails."""
    monkeypatch.chdir(tmp_path)
    assert prepared(name)["unread"] == unread
    task = opened(name)
    task = dataclasses.replace(task, unread=tuple(unread))
    batch = task.trial_batch(5)
    inputs = task.own.prepare(batch, CPU)
    share = task.divided.share(batch)
    assert len(share[1]) == len(task.divided.places(batch.data)) - len(unread)
    outputs = task.build_module()(task.divided.taken(inputs))
    arrived = task.divided.prepare(share, 5, 0, 0, CPU)
    assert task.divided.loss(outputs, arrived) == task.divided.loss(outputs, inputs)
    wrong = Divided(task.own, "the task", task.divided.places(batch.data))
    with pytest.raises(ConfigError, match="reads of this batch what it did not read of the first"):
        wrong.loss(outputs, wrong.prepare(wrong.share(batch), 5, 0, 0, CPU))


def prepared(name, *options):
    ranks = [{"host": "here", "gpus": []}] * 3
    words = ["--task", f"staged_tasks:{name}", "--stages", "2", "--run.dir", "run", *options]
    return prepare(words, ranks, None, ExitStack())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Twice", r"loss\(\) calls the module more than once"),
        ("TwoTensors", r"calls the module with \(Tensor, Tensor\), and what enters .* one tensor"),
        ("Inside", r"loss\(\) uses module\[4\], and no rank has the whole module"),
        ("Beside", "the gradient of 4.weight is another one by stages than by the whole network"),
        ("Elsewhere", r"loss\(\) does not call the module that it is given"),
        ("Noisy", r"loss\(\) draws random numbers outside of the module"),
        ("NoisyBy", r"loss\(\) draws random numbers outside of the module"),
        ("NoisyByPython", r"loss\(\) draws random numbers outside of the module"),
        ("Counting", "its loss is another one by stages than by the whole network"),
        ("Grouped", "a batch holds a ndarray, and what travels to the last stage are tensors"),
        ("Redrawn", r"prepare\(\) makes another thing of the same batch the second time"),
        ("TwoOutputs", "the module gives a tuple, and what comes out of the last stage is one"),
        ("Untraceable", "cannot be cut into stages, since torch.fx cannot trace it"),
        ("DrawsAnew", "the module gives another thing when torch.fx has traced it"),
        ("Moving", "forward pass moves calls, which every worker keeps"),
        ("LooksToScore", r"score\(\) uses module\[4\], and no rank has the whole module"),
    ],
)
def test_a_task_that_cannot_be_cut_is_refused_before_the_run(tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"(?s){told}"):
        prepared(name)
    assert not (tmp_path / "run").exists()


def test_a_task_that_can_be_cut_is_prepared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepared("Words", "--stages.at", "2.inner.1")["metrics"] == ["right", "loss"]


def test_the_columns_of_a_task_are_planned_for_what_its_loss_gives_to_the_network(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert prepared("InColumns")["unread"] == ["/0"]
    task = opened("InColumns")
    first, second = task.rows_of_columns(task.build_module())
    # images, and maps at each of the cross-overs, of 16 samples
    assert task.sample().shape == (16, 1, 8, 8) and first.sent_bytes > 16 * 64 * 4
    assert first.parameters > 0 and second.parameters > first.parameters


def test_what_a_network_makes_anew_is_made_by_its_stage_and_a_size_does_not_cross():
    task = opened("Positions")
    module = task.build_module()
    graph = task.stage_plan(module).graph
    refused = {
        graph.name(place): reason
        for place in range(1, len(graph.nodes))
        if (reason := graph.why_not(place))
    }
    assert refused == {"view": "size, which is no tensor of floats, would have to cross"}
    tensors = (graph.sample,)
    for stage in cut(graph, [1, 2, 7]):
        tensors = stage(*tensors)
    torch.manual_seed(0)
    expected = module.eval()(graph.sample)
    tensors = (graph.sample,)
    for stage in cut(graph, [1, 2, 7]):
        tensors = stage(*tensors)
    assert torch.equal(tensors[0], expected)


def test_a_loop_of_ones_own_and_a_process_alone_have_no_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    model = torch.nn.Linear(1, 1)
    loop = Loop(model, options_of(torch.optim.SGD(model.parameters(), lr=0.1)))
    ranks = [{"host": "here", "gpus": []}] * 3
    with pytest.raises(ConfigError, match="your loop computes on a whole network"):
        prepare(["--data.source", "script", "--stages", "2"], ranks, None, ExitStack(), loop)
    with pytest.raises(ConfigError, match="Start 4 of them: mpirun -np 4 python and your script"):
        asgd_mpi.train(staged_tasks.Words, options={"stages.number": 3})
