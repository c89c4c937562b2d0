"""How a gradient is computed by option: in parts, in less precision, with channels last, compiled."""

import pytest
import torch

from asgd_mpi.config import parse as configuration
from asgd_mpi.config.options import ComputeConfig
from asgd_mpi.optim.step import ScaledLoss, compute_gradient_
from asgd_mpi.task import complete, open_task
from asgd_mpi.vector.flat import FlatModel


@pytest.fixture(scope="module")
def task(digits):
    return open_task(
        complete(
            configuration.parse(
                ["--data", str(digits), "--model", "networks_for_tests:without_dropout"]
            )
        )
    )


def gradient(task, batches=(0,), module=None, **compute):
    flat = FlatModel(module or task.build_module(), torch.device("cpu"))
    loss, loader = ScaledLoss(ComputeConfig(**compute)), task.train_loader()
    for number, start in enumerate(batches):
        value = loss.compute_gradient_(
            flat, task.objective, loader.batch(0, start, start + 16), 0, accumulate=number > 0
        )
    loader.close()
    return flat, value, loss


def test_a_batch_in_parts_has_the_gradient_of_the_whole(task):
    whole, loss, _ = gradient(task)
    for parts in (2, 3, 20):
        flat, value, _ = gradient(task, micro_batches=parts)
        assert torch.allclose(
            flat.gradient, whole.gradient, rtol=1e-4, atol=1e-6
        ) and value == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("precision, error", [("bfloat16", 0.03), ("float16", 0.005)])
def test_less_precision_gives_nearly_the_same_gradient_in_float32(task, precision, error):
    whole, _, _ = gradient(task, (0, 16))
    flat, _, _ = gradient(task, (0, 16), precision=precision)
    assert flat.gradient.dtype == torch.float32
    difference = (flat.gradient - whole.gradient).norm() / whole.gradient.norm()
    assert 0 < difference < error


def test_a_scaled_loss_that_overflows_is_computed_again_with_half_the_scale(task):
    class Large(torch.nn.Module):
        """Its gradients are 3000 times as large: 2 ** 16 times that is more than float16 holds."""

        def __init__(self):
            super().__init__()
            self.inner = task.build_module()

        def forward(self, images):
            return self.inner(images) * 3000

    flat, value, loss = gradient(task, module=Large(), precision="float16")
    assert (
        flat.gradient.isfinite().all()
        and flat.gradient.norm() > 0
        and loss._scale < ScaledLoss.FIRST
    )


def test_with_channels_last_the_weights_lie_so_in_the_vector_and_the_gradient_is_the_same(task):
    flat, _, _ = gradient(task)
    last, _, _ = gradient(
        task, module=task.build_module().to(memory_format=torch.channels_last), channels_last=True
    )
    for one, other in zip(flat.module.parameters(), last.module.parameters()):
        assert torch.equal(one, other) and torch.allclose(one.grad, other.grad, atol=1e-6)
        assert other.data_ptr() >= last.weights.data_ptr()
    convolution = next(last.module.parameters())
    assert convolution.shape[1] == 1 or convolution.is_contiguous(memory_format=torch.channels_last)


def test_one_part_in_float32_is_the_plain_gradient_to_the_bit(task):
    flat, value, _ = gradient(task)
    other = FlatModel(task.build_module(), torch.device("cpu"))
    loader = task.train_loader()
    assert compute_gradient_(other, task.objective, loader.batch(0, 0, 16), 0) == value
    loader.close()
    assert torch.equal(flat.gradient, other.gradient)
