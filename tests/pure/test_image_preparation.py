"""How images are prepared: one scale for a set, mean and deviation by whose word, a recipe by their size."""

import dataclasses
import hashlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from photos import write_tree
from PIL import Image
from torchvision import models
from torchvision.transforms import functional as theirs

from asgd_mpi import evaluate, simulate
from asgd_mpi.config import written as configuration
from asgd_mpi.config.resolved import with_recipe
from asgd_mpi.config.parse import parse
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import ConfigError
from asgd_mpi.model import networks, pretrained
from asgd_mpi.record import checkpoint
from asgd_mpi.runtime import resume
from asgd_mpi.task import complete, open_task, told
from data_prep import arrays, imagenet

RNG = np.random.default_rng(3)


def tree_of(root, side, count=6):
    """Two classes of square PNG files; PNG so that pixels are what they are."""
    for split in ("train", "val"):
        for label in range(2):
            directory = root / split / f"class{label}"
            directory.mkdir(parents=True)
            for number in range(count):
                pixels = RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(directory / f"{split}{label}{number}.png")
    return root


def raw_of(tree, out):
    """The same images, in the order of a folder, as raw shards."""
    splits = {}
    for split in ("train", "val"):
        paths = sorted((tree / split).rglob("*.png"))
        splits[split] = (
            np.stack([np.array(Image.open(path)) for path in paths]),
            np.array([int(path.parent.name[-1]) for path in paths]),
            [path.name for path in paths],
        )
    arrays.write(out, splits, ["class0", "class1"], 100)
    return out


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    tree = tree_of(root / "tree", 32)
    raw_of(tree, root / "raw")
    imagenet.prepare(tree, root / "jpeg", quality=95, workers=1)
    return {"folder": root / "tree", "raw": root / "raw", "jpeg": root / "jpeg"}


def opened(sets, kind, *options):
    source = ["--data.source", "folder"] if kind == "folder" else []
    return open_task(
        complete(parse([*source, "--data", str(sets[kind]), "--model", "resnet18", *options]))
    )


@pytest.mark.parametrize("kind", ["folder", "raw", "jpeg"])
@pytest.mark.parametrize("augment", ["paper", "pad_crop"])
def test_images_of_the_size_that_is_asked_for_are_taken_as_they_are_in_training_and_validation(
    sets, kind, augment
):
    for options in ([], ["--data.image_size", "32"]):
        task = opened(sets, kind, "--data.augment", augment, *options)
        assert (task.config.data.image_size, task.config.data.resize) == (32, 32)
        assert task.train_loader().policy.short_side == task.val_loader().policy.short_side == 32
    if kind == "jpeg":
        return
    loader = task.val_loader()
    batch = loader.batch(0, 0, 12)
    for row in range(12):
        path = next(sets["folder"].rglob(loader.shards.source(row).rsplit("/", 1)[-1]))
        assert np.array_equal(
            batch.images[row].permute(1, 2, 0).numpy(), np.array(Image.open(path))
        )


@pytest.mark.parametrize("size, resize", [(24, 27), (16, 18), (32, 32), (48, 48), (224, 224)])
def test_shards_raw_images_and_trees_have_one_scale_for_any_size_asked(sets, size, resize):
    found = [
        opened(sets, kind, "--data.image_size", str(size), "--data.augment", "paper")
        for kind in sets
    ]
    assert {task.config.data.resize for task in found} == {resize}
    for task in found:
        assert (
            task.train_loader().policy.short_side == task.val_loader().policy.short_side == resize
        )
    assert any("are enlarged" in line for line in told(found[0])) == (size > 32)


def test_photographs_are_validated_as_by_torchvision_whatever_their_sides(tmp_path):
    task = open_task(
        complete(
            parse(
                [
                    "--data.source",
                    "folder",
                    "--data",
                    str(write_tree(tmp_path / "tree")),
                    "--model",
                    "resnet18",
                ]
            )
        )
    )
    loader = task.val_loader()
    # they are smaller than that, of many sides
    assert (task.config.data.image_size, task.config.data.resize) == (224, 224)
    task = open_task(
        dataclasses.replace(task.config, data=dataclasses.replace(task.config.data, resize=256))
    )
    batch = task.val_loader().batch(0, 0, 9)
    for row in range(9):
        image = theirs.pil_to_tensor(Image.open(tmp_path / "tree" / loader.shards.source(row)))
        expected = theirs.center_crop(theirs.resize(image, 256, antialias=True), [224, 224])
        assert (batch.images[row].int() - expected.int()).abs().max() <= 1


def test_a_record_without_a_scale_is_read_as_what_was_in_force_then(sets):
    config = complete(
        parse(["--data", str(sets["raw"]), "--model", "resnet18", "--data.augment", "paper"])
    )
    lines = configuration.record(config, 1).splitlines()
    kept = [
        line
        for line in lines
        if line.split(":")[0].strip() not in ("resize", "mean", "std", "recipe")
    ]
    assert len(lines) - len(kept) == 4
    old = "\n".join(kept)
    task = open_task(configuration.from_yaml(old))
    assert (task.train_loader().policy.short_side, task.val_loader().policy.short_side) == (37, 32)
    assert (task.mean, task.std) == (task.train.mean, task.train.std)
    again = configuration.asked(old)
    assert (again.data.resize, again.data.mean) == (0, "")
    assert not resume.demand_same(again, complete(parse([], base=again)))


def test_mean_and_deviation_are_those_given_or_of_the_weights_or_of_the_data_set_and_are_said(
    sets, tmp_path
):
    data_set = ShardSet.open(sets["raw"], "train")
    task = opened(sets, "raw")
    assert task.mean == data_set.mean and any(f"of {sets['raw']}" in line for line in told(task))
    task = opened(sets, "raw", "--data.mean", "0.5,0.25,0.125", "--data.std", "0.5,0.5,0.25")
    assert task.mean == (0.5, 0.25, 0.125) and any("as given" in line for line in told(task))
    pixels = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    assert task.normalise(pixels).flatten().tolist() == pytest.approx([1, 1.5, 3.5])
    torch.save({}, tmp_path / "resnet18-f37072fd.pth")
    task = opened(
        sets, "raw", "--weights", str(tmp_path / "resnet18-f37072fd.pth"), "--data.image_size", "32"
    )
    assert (task.mean, task.config.data.resize) == ((0.485, 0.456, 0.406), 32)
    assert any("of torchvision's ResNet18_Weights.IMAGENET1K_V1" in line for line in told(task))
    torch.save({}, tmp_path / "other.pth")
    task = opened(sets, "raw", "--weights", str(tmp_path / "other.pth"))
    assert task.mean == data_set.mean and any(
        "does not say with which mean" in line for line in told(task)
    )


@pytest.mark.parametrize(
    "name",
    [
        "ResNet18_Weights.IMAGENET1K_V1",
        "torchvision:ResNet50_Weights.IMAGENET1K_V2",
        "EfficientNet_V2_S_Weights.DEFAULT",
        "Inception_V3_Weights.IMAGENET1K_V1",
    ],
)
def test_weights_that_torchvision_names_bring_its_sizes_and_a_word_about_another_interpolation(
    sets, name
):
    weights = models.get_weight(name.removeprefix("torchvision:"))
    preset, found = weights.transforms(), pretrained.expected(name)
    assert (found.image_size, found.resize, found.mean) == (
        preset.crop_size[0],
        preset.resize_size[0],
        tuple(preset.mean),
    )
    assert bool(found.note) == (preset.interpolation.value != "bilinear")
    data = complete(
        parse(["--data", str(sets["raw"]), "--model", "resnet18", "--weights", name])
    ).data
    assert (data.image_size, data.resize) == (preset.crop_size[0], preset.resize_size[0])
    with pytest.raises(
        ConfigError, match="is not there, and nothing is downloaded here. Get https://"
    ):
        pretrained.file_of(name)


@pytest.mark.parametrize(
    "options, text",
    [
        (["--data.mean", "0.5"], "^--data.std "),
        (["--data.mean", "0.5", "--data.std", "0.5"], "3 channels; give a number for each"),
        (["--data.mean", "124,117,104", "--data.std", "58,57,57"], "^--data.mean 124"),
        (["--data.mean", "a", "--data.std", "b"], "^--data.mean a"),
        (["--data.image_size", "32", "--data.resize", "31"], "^--data.resize 31"),
        (["--weights", "ResNet18_Weights.NONE"], "torchvision has no such weights"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line(sets, options, text):
    with pytest.raises(ConfigError, match=text):
        opened(sets, "raw", *options).first_module()


@pytest.mark.parametrize(
    "model, size, name",
    [
        ("resnet18", 32, "small_images"),
        ("resnet18", 64, "small_images"),
        ("resnet18", 65, "imagenet_resnet"),
        ("digits_cnn", 32, "digits"),
        ("mine:net", 28, "small_images"),
        ("mine:net", 224, "imagenet_resnet"),
        ("alexnet", 224, "imagenet_alexnet"),
        ("torchvision:vgg11", 32, "small_images"),
        ("torchvision:vit_b_16", 224, "imagenet_transformer"),
        ("torchvision:convnext_tiny", 32, "small_transformer"),
    ],
)
def test_the_recipe_goes_by_the_size_of_the_images_and_is_told(model, size, name):
    chosen = networks.recipe(model, size)
    assert chosen is networks.RECIPES[name]
    config = parse(["--model", model, "--data.image_size", str(size), "--epochs", "3"])
    line = networks.recipe_told(with_recipe(config, chosen))
    assert (
        f"recipe {name} " in line and ": 3 epochs" in line and f"augment {chosen.augment}" in line
    )
    assert networks.recipe(model, size, "imagenet_alexnet") is networks.IMAGENET_ALEXNET


def test_the_recipe_for_cifar_is_told_as_the_documents_show_it():
    config = parse(["--model", "resnet18", "--data.image_size", "32", "--epochs", "5"])
    config = with_recipe(config, networks.recipe("resnet18", 32))
    page = Path(__file__).parent
    while not (page / "docs").is_dir():
        page = page.parent
    assert f"\n{networks.recipe_told(config)}\n" in (page / "docs/own-training.md").read_text()


def test_a_tree_of_32_pixel_images_is_never_trained_with_224_pixels_and_90_epochs(sets):
    for kind in sets:
        config = opened(sets, kind).config
        assert (config.data.image_size, config.run.epochs, config.data.augment) == (
            32,
            200,
            "pad_crop",
        )


def run_of(sets, out, *options):
    assert (
        simulate.main(
            [
                "--workers",
                "1",
                "--out",
                str(out),
                "--data",
                str(sets["raw"]),
                "--model",
                "resnet18",
                "--epochs",
                "1",
                "--batch-size",
                "6",
                "--run.progress",
                "none",
                *options,
            ]
        )
        == 0
    )
    return next((out / "checkpoints").iterdir())


def test_a_checkpoint_keeps_how_images_were_prepared_and_evaluate_takes_it_or_what_is_given(
    sets, tmp_path, capsys
):
    saved = run_of(
        sets,
        tmp_path / "run",
        "--data.mean",
        "0.5,0.25,0.125",
        "--data.std",
        "0.5,0.5,0.25",
        "--data.image_size",
        "24",
    )
    assert "mean 0.500,0.250,0.125, std 0.500,0.500,0.250 as given" in capsys.readouterr().err
    manifest = checkpoint.read_manifest(saved)
    assert (manifest.mean, manifest.std, manifest.resize) == (
        [0.5, 0.25, 0.125],
        [0.5, 0.5, 0.25],
        27,
    )
    assert (
        configuration.from_yaml((tmp_path / "run" / "config.yaml").read_text()).data.mean
        == "0.5,0.25,0.125"
    )

    def loss(*options, of=saved):
        assert (
            evaluate.main([str(of), "--data", str(sets["raw"]), "--device", "cpu", *options]) == 0
        )
        out, err = capsys.readouterr()
        return out.split(": ")[1], err

    same = loss()[0]
    assert (
        loss("--data.mean", "0.5,0.25,0.125", "--data.std", "0.5,0.5,0.25", "--data.resize", "27")[
            0
        ]
        == same
    )
    other, said = loss(
        "--data.mean", "0.1,0.1,0.1", "--data.std", "0.1,0.1,0.1", "--data.resize", "32"
    )
    assert other != same and "as given; the checkpoint was trained with [0.5" in said

    plain = tmp_path / "plain.pt"  # the same weights as a file of any trainer
    torch.save(checkpoint.load(saved)[0], plain)
    given = ["--model", "resnet18", "--data.image_size", "24", "--data.resize", "27"]
    found, said = loss(
        *given, "--data.mean", "0.5,0.25,0.125", "--data.std", "0.5,0.5,0.25", of=plain
    )
    assert found == same
    found, said = loss(*given, of=plain)
    assert found != same and f"of {sets['raw']}" in said and "does not say with which mean" in said
    assert evaluate.main([str(plain), "--data", str(sets["raw"])]) == 2
    assert "does not name its network: give --model NAME" in capsys.readouterr().err
    assert evaluate.main([str(plain), "--data", str(sets["raw"]), "--model", "digits_cnn"]) == 2
    assert "does not fit the network" in capsys.readouterr().err


def test_a_manifest_of_before_keeps_its_seal():
    old = checkpoint.Manifest(1, 1, "m", 2, 1, 8, "", [0.0], [1.0])
    said = {
        name: value
        for name, value in msgspec.structs.asdict(old).items()
        if name not in ("class_names", "resize", "metrics", "is_own", "sha256")
    } | {"sha256": ""}
    assert old.seal() == hashlib.sha256(msgspec.json.encode(said)).hexdigest()
    assert old.seal() != msgspec.structs.replace(old, resize=8).seal()
