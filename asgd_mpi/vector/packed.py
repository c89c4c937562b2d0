"""Some tensors in one message that says itself what it holds: from stage to stage of a replica."""

from __future__ import annotations

import numpy as np
import torch

# that travel
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.complex64, torch.complex128),
)
ALIGNMENT = 64  # bytes; a tensor begins on such a boundary of its message


def pack(part: int, tensors: tuple[torch.Tensor, ...], memory: dict) -> torch.Tensor:
    """One message, uint8: words (their count, the part; of each tensor type, layout, dimensions, sizes), then tensors."""
    words, laid_out = [0, part], []
    for tensor in tensors:
        pixels = (
            tensor.dim() == 4
            and not tensor.is_contiguous()
            and tensor.is_contiguous(memory_format=torch.channels_last)
        )
        laid_out.append(tensor.permute(0, 2, 3, 1) if pixels else tensor)
        words += [DTYPES.index(tensor.dtype), int(pixels), tensor.dim(), *laid_out[-1].shape]
    words[0] = len(words)
    starts = np.cumsum(
        [_aligned(8 * len(words)), *(_aligned(tensor.nbytes) for tensor in laid_out)]
    ).tolist()
    message = torch.empty(starts[-1], dtype=torch.uint8, **memory)
    message[: 8 * len(words)] = torch.tensor(words).view(torch.uint8)
    for start, tensor in zip(starts, laid_out):
        message[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return message


def unpack(message: torch.Tensor, device: torch.device) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Return the part and the tensors of a message; they are views of it if it is on their device."""
    words = message[: 8 * int(message[:8].view(torch.int64))].view(torch.int64).tolist()
    part, rest, start, tensors = words[1], words[2:], _aligned(8 * len(words)), []
    while rest:
        dtype, pixels, num_dimensions = DTYPES[rest[0]], rest[1], rest[2]
        shape, rest = rest[3 : 3 + num_dimensions], rest[3 + num_dimensions :]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        # to autograd they are not one tensor
        tensor = message[start : start + size].view(dtype).view(shape).data.to(device)
        tensors.append(tensor.permute(0, 3, 1, 2) if pixels else tensor)
        start += _aligned(size)
    return part, tuple(tensors)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
