"""The images of data_prep.synthetic in the layouts that others publish ImageNet in."""

import io
import json
import shutil
import tarfile

from data_prep.devkit import read_devkit


def kaggle(made, out):
    """ILSVRC/Data/CLS-LOC with a flat val, LOC_val_solution.csv, LOC_synset_mapping.txt, and a test set without classes."""
    kit, images = read_devkit(made / "archives"), out / "ILSVRC/Data/CLS-LOC"
    shutil.copytree(made / "tree/train", images / "train")
    (images / "val").mkdir()
    (images / "test").mkdir()
    rows = ["ImageId,PredictionString"]
    # in no order, as there
    for path in sorted((made / "tree/val").rglob("*.JPEG"), key=lambda path: path.name[::-1]):
        shutil.copy(path, images / "val")
        rows.append(f"{path.stem},{path.parent.name} 85 1 499 272 {path.parent.name} 3 4 50 60 ")
        shutil.copy(path, images / "test" / path.name.replace("val", "test"))
    (out / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    (out / "LOC_synset_mapping.txt").write_text(
        "".join(f"{synset} {kit.words[synset]}\n" for synset in sorted(kit.words))
    )
    return out


def labelled(made):
    """(split, path, label) of each image, in an order that mixes the classes; training images first."""
    synsets = sorted(path.name for path in (made / "tree/train").iterdir())
    for split in ("train", "val"):
        for path in sorted(
            (made / "tree" / split).rglob("*.JPEG"), key=lambda path: path.name[::-1]
        ):
            yield split, path, synsets.index(path.parent.name)


def parquet(made, out, with_paths=True):
    """data/train-00000-of-00002.parquet ..., compressed, the synset added to each name, and a test set with labels -1."""
    import pyarrow
    from pyarrow import parquet as files

    kit = read_devkit(made / "archives")
    (out / "data").mkdir(parents=True)
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {
        "label": {
            "names": [kit.words[synset] for synset in sorted(kit.words)],
            "_type": "ClassLabel",
        }
    }
    schema = pyarrow.schema(
        [("image", image), ("label", pyarrow.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = {"train": [], "validation": [], "test": []}
    for split, path, label in labelled(made):
        name = f"{path.stem}_{path.parent.name}.JPEG" if with_paths else None
        rows["validation" if split == "val" else split].append(
            ({"bytes": path.read_bytes(), "path": name}, label)
        )
    rows["test"] = [(image, -1) for image, _ in rows["validation"]]
    for split, part in rows.items():
        for number, some in enumerate((part[: len(part) // 3], part[len(part) // 3 :])):
            table = pyarrow.table(
                {"image": [one for one, _ in some], "label": [label for _, label in some]},
                schema=schema,
            )
            files.write_table(
                table, out / f"data/{split}-{number:05d}-of-00002.parquet", row_group_size=7
            )
    return out


def webdataset(made, out, keep_names=True):
    """imagenet1k-train-0000.tar ...: .jpg, .cls and .json of each image one behind the other."""
    out.mkdir(parents=True)
    rows = {"train": [], "validation": []}
    for split, path, label in labelled(made):
        rows["validation" if split == "val" else split].append((path, label))
    for split, part in rows.items():
        for number in range(3):
            with tarfile.open(
                out / f"imagenet1k-{split}-{number:04d}.tar", "w", format=tarfile.USTAR_FORMAT
            ) as tar:
                for place, (path, label) in list(enumerate(part))[number::3]:
                    key = path.stem if keep_names else f"{split}{place:06d}"
                    about = json.dumps({"label": label, "filename": path.name}).encode()
                    for extension, data in (
                        ("cls", str(label).encode()),
                        ("jpg", path.read_bytes()),
                        ("json", about),
                    ):
                        entry = tarfile.TarInfo(f"{key}.{extension}")
                        entry.size = len(data)
                        tar.addfile(entry, io.BytesIO(data))
    return out
