"""A character transformer to compare rules with: `--task benchmarks.characters:Topics`, 125,000 parameters.

The text is that of Python's own help (pydoc's topics), 0.7 MB of English and code; 4000 batches of 8 windows of 64 characters are
trained on, and the loss is told in nats per character, on windows of the last tenth.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import asgd_mpi

LENGTH = 64  # characters of a window
BATCH, BATCHES = 8, 4000
NUM_VALIDATION = 1000  # windows
SOURCE = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"


class Windows(torch.utils.data.Dataset):
    """`number` windows of LENGTH + 1 characters of a text, evenly apart."""

    def __init__(self, characters: torch.Tensor, number: int):
        self.characters, self.number = characters, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * (len(self.characters) - LENGTH - 1) // self.number
        return self.characters[start : start + LENGTH + 1]


class Transformer(nn.Module):
    """(B, LENGTH) int64 -> (B, LENGTH, vocabulary) float32; two layers, four heads, without dropout."""

    def __init__(self, vocabulary: int, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        known = self.embedding(characters) + self.positions
        return self.scores(self.norm(self.layers(known, mask=self.mask, is_causal=True)))


class Topics(asgd_mpi.Task):
    unit = "windows"
    options = {
        "rule.name": "adamw",
        "rule.beta2": 0.95,
        "rule.clip_norm": 1.0,
        "schedule.lr": 3e-3,
        "run.epochs": 1.0,
        "schedule.warmup_epochs": 0.02,
        "data.batch_size": BATCH,
    }

    def __init__(self):
        text = SOURCE.read_text(encoding="utf-8")
        self.alphabet = sorted(set(text))
        numbers = {character: number for number, character in enumerate(self.alphabet)}
        self.characters = torch.tensor([numbers[character] for character in text])
        self.cut = len(text) * 9 // 10

    def train_set(self) -> Windows:
        return Windows(self.characters[: self.cut], BATCH * BATCHES)

    def val_set(self) -> Windows:
        return Windows(self.characters[self.cut :], NUM_VALIDATION)

    def module(self) -> Transformer:
        return Transformer(len(self.alphabet))

    def loss(self, module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(module(batch[:, :-1]).transpose(1, 2), batch[:, 1:])

    def score(self, module: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"nats": self.loss(module, batch)}
