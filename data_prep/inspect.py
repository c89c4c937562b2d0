"""Shows a data set: a table, and a contact sheet of random samples with their labels, to look at.

`python -m data_prep.inspect DIR --sheet sheet.png`
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from asgd_mpi.config import limits
from asgd_mpi.data.channels import note_flat_channels
from asgd_mpi.data.decode import decode
from asgd_mpi.data.manifest import read_manifest
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import DataError, few, one_line, tell
from asgd_mpi.untrusted import bounded
from data_prep import run
from data_prep.packing import REPORT, Report

CELL, CAPTION = 160, 34  # pixels
_CELLS = limits.at_least(1, 100), "give 1 to 100"
# Of `python -m benchmarks.agreement`; the whole table is in docs/imagenet.md.
OF_RAW = "stored as pixels: with 224 of 256 pixels, validation sees what torchvision makes of the files, to the bit"
OF_SHRINKING = "with a short side of 256 (320), a network trained on ImageNet gave 435 (467) of 512 photographs the class that it gave the files"
RANGES = {"rows": _CELLS, "columns": _CELLS, "seed": limits.RANGES["run.seed"]}


def inspect(root: Path, sheet: Path | None = None, split: str = "train", rows: int = 5, columns: int = 8,
            seed: int = 0) -> None:  # fmt: skip
    """Print what a data set holds, and draw random samples.

    Args:
        root: directory of the data set
        sheet: PNG file to write: random samples with their labels; none if it is not given
        split: that the samples are drawn from
        rows: of the contact sheet
        columns: of the contact sheet
        seed: of the draw
    """
    manifest, fingerprint = read_manifest(root)
    tell(f"{root}: {manifest.encoding}{manifest.image_shape or ''}, {len(manifest.class_names)} classes, "
          f"shuffled with seed {manifest.seed}, fingerprint {fingerprint}")  # fmt: skip
    tell(
        f"mean {_rounded(manifest.mean)}, std {_rounded(manifest.std)}; made by "
        # fmt: skip
        + ", ".join(f"{name} {version}" for name, version in manifest.software.items())
    )
    print(
        f"{'split':8}{'samples':>10}{'shards':>8}{'MB':>12}{'bytes/sample':>14}{'a class':>14}{'skipped':>9}"
    )
    for name, entry in manifest.splits.items():
        shards = ShardSet.open(root, name)
        num_bytes = sum(shard.num_bytes for shard in entry.shards)
        counts = np.bincount(
            shards.labels(np.arange(shards.num_samples)), minlength=shards.num_classes
        )
        tell(
            f"{name:8}{entry.num_samples:>10}{len(entry.shards):>8}{num_bytes / 1e6:>12,.1f}"
            # fmt: skip
            f"{num_bytes // entry.num_samples:>14}{f'{counts.min()}..{counts.max()}':>14}{len(entry.skipped):>9}"
        )
    for note in [*note_flat_channels(manifest.std), *_packed(root)]:
        tell(note)
    if sheet is None:
        return
    shards = ShardSet.open(root, split)
    chosen = np.random.default_rng(seed).permutation(shards.num_samples)[: rows * columns]
    try:
        draw(shards, np.sort(chosen), columns).save(sheet, "PNG")
    except OSError as error:
        raise DataError(
            f"cannot write {sheet}: {error.strerror}; choose another --sheet"
        ) from error
    tell(f"{sheet}: {len(chosen)} random samples of {split}")


def _packed(root: Path) -> Iterator[str]:
    """Say what the packing did to the images, from its report; nothing of sets that have none."""
    try:
        report = bounded.decode_json(bounded.read(root / REPORT), msgspec.json.Decoder(Report))
    except FileNotFoundError:
        return
    except (OSError, msgspec.DecodeError) as error:
        yield one_line(f"{root / REPORT} cannot be read, so what was changed is not told: {error}")
        return
    for split, remarks in report.images.items():
        for what, names in remarks.items():
            yield one_line(f"{split}: {what}: {len(names)} images, {few(names)}")
    side = report.options.get("short_side", "None")
    if report.options.get("mode") == "raw":
        yield OF_RAW
    elif side != "None":
        yield one_line(f"shrunk to {side} pixels on the short side: {OF_SHRINKING}")


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
        for line, text in enumerate(
            (f"{label} {shards.class_names[label]}", shards.source(index).rsplit("/", 1)[-1])
        ):
            while pen.textlength(text, font) > CELL - 6:
                text = text[:-2] + "…"
            pen.text((left + 3, top + CELL + 14 * line), text, fill="black", font=font)
    return sheet


def _rounded(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.3f}" for value in values) + "]"


if __name__ == "__main__":
    run(inspect, RANGES, positional=True)
