"""Parquet files as Hugging Face ships image sets: a column `image` of {bytes, path} and a column `label` of numbers.

In: such files. Out: rows (see labelled) of the images' bytes in one plain file for each, and the names of the classes. The
images are compressed a hundred at a time, so they cannot be read in place in a random order: they are unpacked, once, into the
data set's directory, and removed when it is done. Needs pyarrow, the extra `parquet`: the format has no reader of its size.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from asgd_mpi.errors import ConfigError, DataError
from data_prep.labelled import Row
from data_prep.takeover import fsync, own

ROWS = 64  # at a time


def unpack(file: Path, scratch: Path, count: Callable[[int], None]) -> list[Row]:
    """Write the images of a parquet file one behind the other into a file of `scratch`; return where they lie."""
    place = scratch / f"{file.name}.images"
    rows, at = [], 0
    with _explained(file):
        parquet = _pyarrow().ParquetFile(file)
        _check_columns(file, parquet.schema_arrow)
        mine = own(place)
        with mine.open("wb") as out:
            for batch in parquet.iter_batches(ROWS, columns=["image", "label"], use_threads=False):
                for image, label in zip(batch.column("image"), batch.column("label"), strict=True):
                    data, path = image["bytes"].as_buffer(), image["path"].as_py()
                    if data is None or label.as_py() is None or label.as_py() < 0:
                        raise DataError(
                            f"row {len(rows)} of {file} has no image or no label; get the files of train and validation"
                        )
                    stem, extension = os.path.splitext(
                        os.path.basename(path or f"{file.stem}_{len(rows):06d}")
                    )
                    out.write(data)
                    rows.append(
                        Row(str(place), at, data.size, stem, extension.lstrip("."), label.as_py())
                    )
                    at += data.size
                count(batch.num_rows)
            out.flush()
            os.fsync(out.fileno())
        os.rename(mine, place)
        fsync(scratch)
    return rows


def class_words(file: Path) -> dict[str, str]:
    """Return what the labels are called, by number, as Hugging Face writes it into the file; empty if it does not say."""
    with _explained(file):
        metadata = _pyarrow().ParquetFile(file).schema_arrow.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        return {str(label): str(name) for label, name in enumerate(names)}
    except (KeyError, TypeError, ValueError):
        return {}


def _check_columns(file: Path, schema) -> None:
    names = set(schema.names)
    inside = {field.name for field in schema.field("image").type} if "image" in names else set()
    if "label" not in names or not {"bytes", "path"} <= inside:
        raise DataError(f"{file} has the columns {', '.join(schema.names)}; give files with `image` (bytes and path) and "
                        f"`label`, as Hugging Face writes image sets")  # fmt: skip


def _pyarrow():
    try:
        from pyarrow import parquet  # an extra, and slow to import
    except ImportError:
        raise ConfigError(
            "parquet files need pyarrow to be read: pip install 'asgd_mpi[parquet]', or pip install pyarrow"
        ) from None
    return parquet


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file into DataError; its errors are ValueError, OSError or its own."""
    try:
        yield
    except (DataError, ConfigError):
        raise
    except Exception as error:
        if getattr(error, "errno", None):  # of the disk
            raise
        raise DataError(
            f"{file} is no parquet file or is damaged ({str(error).splitlines()[0]}); get it again"
        ) from error
