"""Fine-tuning in a loop of your own: torchvision's ResNet-18 for the digits that scikit-learn ships, its backbone frozen.

    mpirun -np 4 python examples/finetune.py --backbone resnet18-f37072fd.pth     # a state_dict that you have
    python examples/finetune.py                                                   # a backbone of random weights

The head is new and learns fast, the last normalisation learns ten times as slowly, and nothing else is trained or travels. It
prints the share of the held-out digits that the final weights know, and writes them to head.pt (a plain state_dict).
"""

import argparse

import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import asgd_mpi

parser = argparse.ArgumentParser()
parser.add_argument("--backbone", help="a state_dict of torchvision's resnet18")
parser.add_argument("--images", type=int, default=1000, help="digits to train on")
mine, _ = parser.parse_known_args()  # what is not mine is asgd_mpi's: --epochs, --run.dir ...

torch.manual_seed(0)
model = torchvision.models.resnet18()
if mine.backbone:
    model.load_state_dict(torch.load(mine.backbone, weights_only=True))
model.requires_grad_(False)
model.fc = nn.Linear(model.fc.in_features, 10)
last = model.layer4[1].bn2.requires_grad_(True)

pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
images = functional.interpolate(images, scale_factor=4).repeat(1, 3, 1, 1)
digits = torch.utils.data.TensorDataset(images, torch.tensor(labels))
order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0)).tolist()
train_set = torch.utils.data.Subset(digits, order[: mine.images])
val_set = torch.utils.data.Subset(digits, order[-200:])

groups = [{"params": model.fc.parameters()}, {"params": last.parameters(), "lr": 1e-3}]
optimizer = torch.optim.AdamW(groups, lr=1e-2)
# each worker keeps Adam's means of its own gradients, which bears several workers in a run as short as this
run = asgd_mpi.init(model, optimizer, epochs=2, options={"rule.momentum_at": "dana"})


@run.validate(val_set, maximize=True)
def accuracy(batch):
    images, labels = batch
    return {"accuracy": (model(images).argmax(1) == labels).float().mean()}


for images, labels in run.batches(train_set, batch_size=32):
    model.eval()  # the statistics of a frozen backbone stay as they are
    loss = functional.cross_entropy(model(images), labels)
    loss.backward()
    run.step(loss)

if not run.rank_is_worker or run.is_alone:
    model.eval()
    held_out = next(iter(torch.utils.data.DataLoader(val_set, batch_size=len(val_set))))
    with torch.no_grad():
        print(f"held out: accuracy {accuracy(held_out)['accuracy']:.2f}; {run.directory}")
    torch.save(model.fc.state_dict(), "head.pt")
