"""Shows a data set: a table, and a contact sheet of random samples with their labels, to look at.

`python -m data_prep.inspect DIR --sheet sheet.png`
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from asgd_mpi.config import limits
from asgd_mpi.data.channels import note_flat_channels
from asgd_mpi.data.decode import decode
from asgd_mpi.data.manifest import read_manifest
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import DataError, tell
from data_prep import run

CELL, CAPTION = 160, 34  # pixels
_CELLS = limits.at_least(1, 100), "give 1 to 100"
RANGES = {"rows": _CELLS, "columns": _CELLS, "seed": limits.RANGES["run.seed"]}


def inspect(root: Path, sheet: Path = Path("contact_sheet.png"), split: str = "train", rows: int = 5, columns: int = 8,
            seed: int = 0) -> None:  # fmt: skip
    """Print what a data set holds and draw random samples.

    Args:
        root: directory of the data set
        sheet: PNG file to write
        split: that the samples are drawn from
        rows: of the contact sheet
        columns: of the contact sheet
        seed: of the draw
    """
    manifest, fingerprint = read_manifest(root)
    print(f"{root}: {manifest.encoding}{manifest.image_shape or ''}, {len(manifest.class_names)} classes, "
          f"shuffled with seed {manifest.seed}, fingerprint {fingerprint}")  # fmt: skip
    tell(f"mean {_rounded(manifest.mean)}, std {_rounded(manifest.std)}; made by "
          + ", ".join(f"{name} {version}" for name, version in manifest.software.items()))  # fmt: skip
    print(f"{'split':8}{'samples':>10}{'shards':>8}{'MB':>12}{'bytes/sample':>14}{'a class':>14}{'skipped':>9}")
    for name, entry in manifest.splits.items():
        shards = ShardSet.open(root, name)
        num_bytes = sum(shard.num_bytes for shard in entry.shards)
        counts = np.bincount(shards.labels(np.arange(shards.num_samples)), minlength=shards.num_classes)
        tell(f"{name:8}{entry.num_samples:>10}{len(entry.shards):>8}{num_bytes / 1e6:>12,.1f}"
              f"{num_bytes // entry.num_samples:>14}{f'{counts.min()}..{counts.max()}':>14}{len(entry.skipped):>9}")  # fmt: skip
    for note in note_flat_channels(manifest.std):
        print(note)
    shards = ShardSet.open(root, split)
    chosen = np.random.default_rng(seed).permutation(shards.num_samples)[: rows * columns]
    try:
        draw(shards, np.sort(chosen), columns).save(sheet, "PNG")
    except OSError as error:
        raise DataError(f"cannot write {sheet}: {error.strerror}; choose another --sheet") from error
    print(f"{sheet}: {len(chosen)} random samples of {split}")


def draw(shards: ShardSet, indices: np.ndarray, columns: int) -> Image.Image:
    """Return a contact sheet; under each sample its class and its source."""
    rows = -(-len(indices) // columns)
    sheet = Image.new("RGB", (columns * CELL, rows * (CELL + CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for place, index in enumerate(indices.tolist()):
        left, top = place % columns * CELL, place // columns * (CELL + CAPTION)
        data = shards.read(index)
        pixels = data if shards.encoding == "raw" else decode(data)
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        scale = (CELL - 6) / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size])
        sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
        label = shards.labels(index)
        for line, text in enumerate((f"{label} {shards.class_names[label]}", shards.source(index).rsplit("/", 1)[-1])):
            while pen.textlength(text, font) > CELL - 6:
                text = text[:-2] + "…"
            pen.text((left + 3, top + CELL + 14 * line), text, fill="black", font=font)
    return sheet


def _rounded(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.3f}" for value in values) + "]"


if __name__ == "__main__":
    run(inspect, RANGES, positional=True)
