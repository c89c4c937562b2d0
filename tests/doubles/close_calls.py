"""How many images two classes share but for rounding: computed in a batch of another size, they may be given the other one."""

from contextlib import closing

import torch

from asgd_mpi.data.augment import Normalise, make_policy
from asgd_mpi.data.loader import Loader, ranges
from asgd_mpi.data.order import Sequential
from asgd_mpi.model import networks
from asgd_mpi.optim.classification import Classification

NEAR = 1e-5  # of the scores; float32 has 1e-7, and hundreds of terms are summed


def close_calls(state, manifest, shards) -> int:
    """Return for how many images of a split the first two scores of a checkpoint's network are as good as equal."""
    shape, found = shards.image_shape, 0
    module = networks.build(manifest.model, manifest.num_classes, shape[2], manifest.image_size)
    module.load_state_dict(state)
    module.eval()
    objective = Classification(Normalise(manifest.mean, manifest.std))
    policy = make_policy("none", manifest.image_size, shape, manifest.resize)
    order = Sequential(shards.num_samples)
    with closing(Loader(shards, order, policy, seed=0, threads=1)) as loader, torch.no_grad():
        for batch in loader.batches(ranges(0, 0, shards.num_samples, 100)):
            images, _ = objective.prepare(batch, torch.device("cpu"))
            best = module(images).topk(2, dim=1).values
            found += int((best[:, 0] - best[:, 1] <= NEAR * (1 + best.abs().amax(1))).sum())
    return found
