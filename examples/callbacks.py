"""Metrics for a tracker of experiments (Weights & Biases, MLflow, your own plots) while a loop of your own trains.

    mpirun -np 4 python examples/callbacks.py
    python examples/callbacks.py

`Tracker` stands for their clients, and writes what it gets to tracked.jsonl: replace its line by the client's, as the comment
says. It prints the last line of that file. Only rank 0 sees pushes and validations, so only one tracker writes.
"""

import json
from pathlib import Path

import torch
from torch import nn

import asgd_mpi
from asgd_mpi.record.events import Push, Retirement, Validation

EVERY = 20  # pushes


class Tracker:
    """What is logged at a step; `step` is the version of the weights."""

    def __init__(self, path="tracked.jsonl"):
        self.path = Path(path)
        self.path.write_text("")  # wandb.init(project=...), mlflow.start_run()

    def log(
        self, values, step
    ):  # wandb.log(values, step=step), mlflow.log_metrics(values, step=step)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


generator = torch.Generator().manual_seed(0)
x = torch.randn(1200, 8, generator=generator)
y = x[:, :2].prod(dim=1, keepdim=True).sign()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
run = asgd_mpi.init(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
tracker = Tracker() if run.is_alone or not run.rank_is_worker else None


@run.on_event
def track(event):
    if isinstance(event, Push) and event.version % EVERY == 0:
        staleness = event.version - event.read_version
        tracker.log({"loss": event.loss, "lr": event.lr, "staleness": staleness}, event.version)
    if isinstance(event, Validation):
        tracker.log(event.metrics, event.version)
    if isinstance(event, Retirement):
        tracker.log({"retired": event.rank}, event.version)


@run.validate(torch.utils.data.TensorDataset(x[1000:], y[1000:]), maximize=True)
def scores(batch):
    return {"accuracy": (model(batch[0]).sign() == batch[1]).float().mean()}


for inputs, signs in run.batches(
    torch.utils.data.TensorDataset(x[:1000], y[:1000]), batch_size=20, epochs=4
):
    loss = nn.functional.soft_margin_loss(model(inputs), signs)
    loss.backward()
    run.log(largest_weight=max(p.abs().max().item() for p in model.parameters()))
    run.step(loss)

if tracker and (lines := tracker.path.read_text().splitlines()):  # a replay has no events
    print("tracked:", lines[-1])
