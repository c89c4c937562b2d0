"""A task of your own with an answer for every pixel: discs on noise, by a small U-Net.

    mpirun -np 4 python -m asgd_mpi.train --task segmentation:Discs     # within examples/
    python -m asgd_mpi.simulate --task segmentation:Discs --workers 3

The last lines it prints have the intersection over union of the discs of the validation set, and its loss.
"""

import torch
from torch import nn
from torch.nn import functional

import asgd_mpi

SIDE = 32  # pixels


class Images(torch.utils.data.Dataset):
    """Pairs of an image (1, SIDE, SIDE) and its mask (SIDE, SIDE): a disc that is a little brighter than the noise around it."""

    def __init__(self, number, seed):
        generator = torch.Generator().manual_seed(seed)
        places = torch.rand(number, 3, generator=generator)
        y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        far = torch.hypot(x - SIDE * places[:, 0, None, None], y - SIDE * places[:, 1, None, None])
        self.masks = (far < 4 + 8 * places[:, 2, None, None]).float()
        noise = torch.randn(number, SIDE, SIDE, generator=generator)
        self.images = (self.masks + 0.7 * noise)[:, None]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.images[number], self.masks[number]


def block(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class UNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.down, self.middle = block(1, width), block(width, 2 * width)
        self.up, self.last = block(3 * width, width), nn.Conv2d(width, 1, 1)

    def forward(self, images):
        fine = self.down(images)
        coarse = self.middle(functional.max_pool2d(fine, 2))
        joined = torch.cat([fine, functional.interpolate(coarse, scale_factor=2)], dim=1)
        return self.last(self.up(joined))[:, 0]


class Discs(asgd_mpi.Task):
    unit, maximize = "images", True
    options = {"schedule.lr": 0.05, "run.epochs": 4, "data.batch_size": 16}

    def train_set(self):
        return Images(512, seed=0)

    def val_set(self):
        return Images(128, seed=1)

    def module(self):
        return UNet()

    def loss(self, module, batch):
        images, masks = batch
        return functional.binary_cross_entropy_with_logits(module(images), masks)

    def score(self, module, batch):
        images, masks = batch
        scores = module(images)
        found, true = scores > 0, masks > 0
        overlap = (found & true).sum(), (found | true).sum()  # summed over all images, then divided
        return {
            "IoU": overlap,
            "loss": functional.binary_cross_entropy_with_logits(scores, masks),
        }
