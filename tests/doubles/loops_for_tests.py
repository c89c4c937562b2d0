"""A training loop of a user's own; what goes wrong in it is named on the command line: `python loops_for_tests.py [--wrong WHAT] ...`."""

import argparse

import torch
from torch import nn

import asgd_mpi

parser = argparse.ArgumentParser()
parser.add_argument("--wrong", default="")
parser.add_argument("--drawn", default="")  # how the first weights are
parser.add_argument("--optimizer", default="SGD")
wanted, _ = parser.parse_known_args()


class Rows(torch.utils.data.Dataset):
    def __init__(self, num, seed):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(num, 4, generator=generator)
        self.y = self.x @ torch.tensor([1.0, -2.0, 3.0, 0.5])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return {"x": self.x[row], "y": self.y[row]}


if wanted.drawn:
    torch.manual_seed(int(wanted.drawn))
model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 1))
settings = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "AdamW": {"weight_decay": 0.1},
    "Adagrad": {},
}
optimizer = getattr(torch.optim, wanted.optimizer)(
    model.parameters(), lr=0.01, **settings.get(wanted.optimizer, {})
)
run = asgd_mpi.init(model, optimizer, schedule=lambda share: 1 - 0.5 * share, epochs=3)
seen = []
run.on_event(lambda event: seen.append(type(event).__name__))


@run.validate(Rows(50, 1), maximize=True)
def near(batch):
    return {"near": ((model(batch["x"])[:, 0] - batch["y"]).abs() < 1).float().mean()}


number = 0
for batch in run.batches(Rows(256 + (wanted.wrong == "other" and run.rank == 2), 0), batch_size=16):
    number += 1
    if wanted.wrong == "raises" and run.rank == 2 and number == 5:
        raise RuntimeError("my own fault")
    if wanted.wrong == "breaks" and run.rank == 2 and number == 5:
        break
    if wanted.wrong == "zeroes":
        optimizer.zero_grad()
        model.zero_grad()
    loss = nn.functional.mse_loss(model(batch["x"])[:, 0], batch["y"])
    loss.backward()
    run.log(half=loss.item() / 2)
    run.step(loss)
if not run.rank_is_worker or run.is_alone:
    print(
        f"{len(seen)} events, {seen.count('Validation')} validations, {seen.count('Push')} pushes"
    )
    print(f"sum of weights {sum(p.double().sum().item() for p in model.parameters())!r}")
