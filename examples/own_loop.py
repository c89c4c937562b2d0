"""A loop of your own: tabular regression (the diabetes set that scikit-learn ships), by AdamW.

    python examples/own_loop.py                    # in this process
    mpirun -np 4 python examples/own_loop.py       # 1 server and 3 workers

The last lines it prints are the error of the final weights on the rows that were held out, and where the run directory is.
"""

import torch
from sklearn.datasets import load_diabetes
from torch import nn

import asgd_mpi

features, target = load_diabetes(return_X_y=True)
x = torch.tensor(features / features.std(0), dtype=torch.float32)
y = torch.tensor((target - target.mean()) / target.std(), dtype=torch.float32)
rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train_set = [{"x": x[row], "y": y[row]} for row in rows[:342]]
val_set = [{"x": x[row], "y": y[row]} for row in rows[342:]]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
criterion = nn.HuberLoss()
run = asgd_mpi.init(model, optimizer, schedule=lambda share: 1 - share)


@run.validate(val_set)
def error(batch):
    guess = model(batch["x"])[:, 0]
    return {"mse": nn.functional.mse_loss(guess, batch["y"])}


for batch in run.batches(train_set, batch_size=16, epochs=30):
    loss = criterion(model(batch["x"])[:, 0], batch["y"])
    loss.backward()
    run.step(loss)

if not run.rank_is_worker or run.is_alone:
    model.eval()
    with torch.no_grad():
        final = nn.functional.mse_loss(model(x[rows[342:]])[:, 0], y[rows[342:]]).item()
    print(f"held out: mean squared error {final:.3f} of a variance of 1; {run.directory}")
