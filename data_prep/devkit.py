"""The development kit of ILSVRC2012: which synset an image of the validation set shows, and what a synset is called.

In: ILSVRC2012_devkit_t12.tar.gz, or the directory unpacked. `data/ILSVRC2012_validation_ground_truth.txt` holds one
ILSVRC2012_ID a line, for ILSVRC2012_val_00000001.JPEG and on; `data/meta.mat` maps these ids (1 to 1000, which are not
in the order of the synsets) to WordNet synsets and their words. A label here is the place in the sorted synsets.
"""

import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import scipy.io

from asgd_mpi.errors import DataError

NAME = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"


@dataclass(frozen=True)
class Devkit:
    words: dict[str, str]  # of a synset: `tench, Tinca tinca`
    truth: list[str]  # the synset of each validation image, in the order of their numbers

    def classes_of(self, names: list[str]) -> list[str]:
        """Return the synset of each validation image, in the order of their names; raise DataError if some are missing."""
        if len(names) != len(self.truth):
            raise DataError(f"there are {len(names)} validation images, but the development kit has the classes of "
                            f"{len(self.truth)}; get the archive again")  # fmt: skip
        place = {name: place for place, name in enumerate(sorted(names))}
        return [self.truth[place[name]] for name in names]


def read_devkit(source: Path) -> Devkit | None:
    """Return the development kit that lies in `source`, None if there is none; raise DataError if it is damaged."""
    archive, directory = source / f"{NAME}.tar.gz", source / NAME
    if os.path.exists(archive):
        with _explained(archive), tarfile.open(archive) as tar:
            return _parse(archive, lambda name: tar.extractfile(f"{NAME}/{name}").read())
    if os.path.isdir(directory):
        with _explained(directory):
            return _parse(directory, lambda name: (directory / name).read_bytes())
    return None


def _parse(path: Path, read: Callable[[str], bytes]) -> Devkit:
    meta = scipy.io.loadmat(io.BytesIO(read(META)), squeeze_me=True)["synsets"]
    # the other synsets are their ancestors
    leaves = [row for row in meta.reshape(-1) if row["num_children"] == 0]
    synset_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    numbers = [int(line) for line in read(GROUND_TRUTH).decode().split()]
    unknown = sorted(set(numbers) - set(synset_of))
    if unknown:
        raise DataError(f"{path}: {GROUND_TRUTH} names the class ids {unknown[:3]}, which {META} does not have; "
                        f"get the development kit again")  # fmt: skip
    return Devkit(
        words={str(row["WNID"]): str(row["words"]) for row in leaves},
        truth=[synset_of[number] for number in numbers],
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what a damaged kit may raise into DataError."""
    try:
        yield
    except (
        OSError,
        tarfile.TarError,
        EOFError,
        zlib.error,
        LookupError,
        ValueError,
        AttributeError,
        TypeError,
    ) as error:
        raise DataError(
            f"{path} is no development kit of ILSVRC2012, or is damaged ({type(error).__name__}: {error}); "
            f"get the one that holds {META} and {GROUND_TRUTH}"
        ) from error
