"""The networks that `--model` names, and the recipe that each is known to train with.

`build(name, num_classes, channels)` gives a module (B, C, S, S) float32 -> (B, num_classes) float32.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from dataclasses import replace

import torch
from torch import nn

from asgd_mpi.config.options import Config, Recipe
from asgd_mpi.config.rulebook import ADAM, optimizer_of, optimizer_told
from asgd_mpi.errors import ConfigError
from asgd_mpi.model.blame import blamed
from asgd_mpi.model.columns import TwoColumns

IMAGENET_RESNET = Recipe(
    epochs=90,
    batch_size=32,
    augment="reference",
    momentum=0.9,
    weight_decay=1e-4,
    # torchvision: 0.1 for 256 images
    schedule="step",
    lr=0.0125,
    warmup_epochs=5,
    source="torchvision's for ResNet on ImageNet",
)
IMAGENET_ALEXNET = Recipe(
    epochs=90,
    batch_size=128,
    augment="paper",
    momentum=0.9,
    weight_decay=5e-4,
    schedule="step",
    lr=0.01,
    warmup_epochs=5,
    source="Krizhevsky 2012, section 5",
)
DIGITS = Recipe(
    epochs=40,
    batch_size=16,
    augment="shift",
    momentum=0.9,
    weight_decay=1e-4,
    schedule="cosine",
    lr=0.02,
    warmup_epochs=2,
    source="for 8-pixel digits",
    most_warmup=1.0,
)
SMALL_IMAGES = Recipe(
    epochs=200,
    batch_size=32,
    augment="pad_crop",
    momentum=0.9,
    weight_decay=5e-4,
    schedule="cosine",
    lr=0.025,
    warmup_epochs=5,  # 0.1 for 128 images
    source="for CIFAR: He 2016 (pad 4, crop, mirror; 0.1 for 128 images), Zagoruyko 2016 (decay, 200 epochs)",
)
# torchvision: 1e-3 for 1024 images; the root of the batch (Malladi et al. 2022, arXiv:2205.10782)
IMAGENET_TRANSFORMER = Recipe(
    epochs=300,
    batch_size=64,
    augment="reference",
    momentum=0.9,
    weight_decay=0.05,
    schedule="cosine",
    lr=2.5e-4,
    warmup_epochs=20,
    source="torchvision's for Swin on ImageNet, which has mixup, cutmix and clipping beside it: AdamW, 0.001 for 1024 images",
    optimizer="adamw",
    no_decay="bias,norm,position",
)
SMALL_TRANSFORMER = replace(
    IMAGENET_TRANSFORMER,
    epochs=200,
    augment="pad_crop",
    lr=1e-3,  # at 2.5e-4 a small ViT and ConvNeXt were 3 to 6 points worse on Fashion-MNIST (docs/convergence.md)
    source="torchvision's for Swin, with epochs and augmentation of small images, and four times the rate",
)
RECIPES = {
    "small_images": SMALL_IMAGES,
    "imagenet_resnet": IMAGENET_RESNET,
    "imagenet_alexnet": IMAGENET_ALEXNET,
    "imagenet_transformer": IMAGENET_TRANSFORMER,
    "small_transformer": SMALL_TRANSFORMER,
    "digits": DIGITS,
}
# torchvision's networks that are trained with AdamW
TRANSFORMERS = ("vit_", "swin_", "maxvit", "convnext_")
SMALL = 64  # pixels: up to this size images are no photographs of ImageNet's


def digits_cnn(num_classes: int, channels: int) -> nn.Module:
    """A small convolutional network for images of about 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(128, num_classes),
    )


class AlexNet(nn.Module):
    """The network of Krizhevsky, Sutskever and Hinton 2012 (figure 2), which Paine et al. 2013 train.

    The two columns of the figure are the two groups of the second, fourth and fifth convolution. torchvision's
    `alexnet` is another network (Krizhevsky 2014). 60 965 224 parameters with 1000 classes. The authors' weights
    start from N(0, 0.01), biases from 1 in convolutions 2, 4, 5 and the hidden linear layers (section 5).
    """

    def __init__(self, num_classes: int, channels: int = 3):
        super().__init__()

        def normalise():  # section 3.3
            # torch divides alpha by the size
            return nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0)

        self.features = nn.Sequential(
            nn.Conv2d(channels, 96, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            normalise(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(96, 256, 5, padding=2, groups=2),
            nn.ReLU(inplace=True),
            normalise(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(256, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, num_classes),
        )
        self._initialise()

    def _initialise(self) -> None:
        convolutions = [layer for layer in self.features if isinstance(layer, nn.Conv2d)]
        linear = [layer for layer in self.classifier if isinstance(layer, nn.Linear)]
        for layer in convolutions + linear:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        for layer in (convolutions[1], convolutions[3], convolutions[4], *linear[:-1]):
            nn.init.ones_(layer.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))


class AlexNet2(TwoColumns):
    """The same network as it is drawn (Krizhevsky 2012, figure 2): two columns, each with half of the maps and neurons.

    A column sees its own maps alone but at the cross-overs, where it sees both columns': in the third convolution and in the
    linear layers (section 3.5). One column's work between two cross-overs needs nothing of the other's, so each may be on a
    rank of its own (--stages.cut columns); the scores, which the figure draws as one, are the second rank's. The response
    normalisation stays within a column, which is all that `alexnet` does in another way. 60 965 224 parameters.
    """

    def __init__(self, num_classes: int, channels: int = 3):
        super().__init__()
        pair = AlexNet(num_classes, channels)  # for its first weights
        parts = {
            "lower": pair.features[:8],
            "upper": nn.Sequential(*pair.features[8:], nn.Flatten()),
            "linear6": pair.classifier[1:3],
            "linear7": pair.classifier[4:6],
        }
        self.columns = nn.ModuleList(
            nn.ModuleDict({name: _column(layers, number) for name, layers in parts.items()})
            for number in range(2)
        )
        self.dropout = nn.Dropout(0.5)
        self.scores = pair.classifier[-1]

    @property
    def segments(self) -> list[nn.Module | tuple[nn.Module, nn.Module]]:
        """Return what crosses over: (B, 2 x 128, 13, 13), (B, 2 x 128 x 36), (B, 2 x 2048) twice."""
        lower, upper, linear6, linear7 = zip(*(column.values() for column in self.columns))
        return [lower, upper, linear6, self.dropout, linear7, self.dropout, self.scores]


def _column(layers: nn.Sequential, number: int) -> nn.Sequential:
    """One of the two columns of `layers`: half of what each gives, of what its group takes."""
    column = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            own = nn.Conv2d(
                layer.in_channels // layer.groups,
                layer.out_channels // 2,
                layer.kernel_size,
                layer.stride,
                layer.padding,
            )
        elif isinstance(layer, nn.Linear):
            own = nn.Linear(layer.in_features, layer.out_features // 2)
        else:
            column.append(copy.deepcopy(layer))
            continue
        for name, parameter in own.named_parameters():
            parameter.data = getattr(layer, name).detach().chunk(2)[number].clone()
        column.append(own)
    return nn.Sequential(*column)


def torchvision_models():
    """Return torchvision's networks: imported by those who want one, since that takes longer than all the rest of a start.

    Raises ConfigError if it cannot be loaded, as one for CUDA beside a torch for the CPU.
    """
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"torchvision cannot be loaded beside torch {torch.__version__} ({error}): install both from one place, "
            "`pip install torch torchvision` with the same index."
        ) from None
    return torchvision.models


def _torchvision(name: str):
    def make(num_classes: int, channels: int) -> nn.Module:
        return torchvision_models().get_model(name, weights=None, num_classes=num_classes)

    return make


NETWORKS = {
    "digits_cnn": (digits_cnn, DIGITS),
    "alexnet": (AlexNet, IMAGENET_ALEXNET),
    "alexnet2": (AlexNet2, IMAGENET_ALEXNET),
    "resnet18": (_torchvision("resnet18"), IMAGENET_RESNET),
    "resnet50": (_torchvision("resnet50"), IMAGENET_RESNET),
}
FORMS = f"{', '.join(NETWORKS)}, torchvision:NAME (such as torchvision:vgg16), or package.module:function"


def recipe(
    name: str, image_size: int | None = None, asked: str = "auto", optimizer: str = ""
) -> Recipe:
    """Return the recipe that is asked for, or that of a network: by the size of its images unless it is made for small ones.

    A network that has none here gets that of ResNet, for photographs; a transformer AdamW's, unless another `optimizer` is given.
    """
    if asked != "auto":
        return RECIPES[asked]
    is_small = image_size is not None and image_size <= SMALL
    is_transformer = name.startswith(tuple(f"torchvision:{one}" for one in TRANSFORMERS))
    if is_transformer and optimizer in ("", *ADAM):
        return SMALL_TRANSFORMER if is_small else IMAGENET_TRANSFORMER
    own = NETWORKS[name][1] if name in NETWORKS else IMAGENET_RESNET
    if is_small and own is not DIGITS:
        return SMALL_IMAGES
    return own


def recipe_told(config: Config) -> str:
    """Say in a line what a complete configuration trains with, and where it comes from."""
    model, optimizer = config.model, optimizer_of(config.rule)
    chosen = recipe(model.name, config.data.image_size, model.recipe, optimizer)
    name = next(name for name, one in RECIPES.items() if one is chosen)
    data, schedule = config.data, config.schedule
    if config.model.recipe != "auto":
        why = "asked for"
    elif chosen.optimizer in ADAM:
        why = "of torchvision's transformers"
    elif chosen is SMALL_IMAGES:
        why = f"by {config.data.image_size} pixels"
    elif config.model.name in NETWORKS:
        why = "of the network"
    else:
        why = "a network of your own has none of its own"
    return (
        f"recipe {name} ({why}; {chosen.source}), with what you gave: {config.run.epochs:g} epochs, batches of {data.batch_size}, "
        f"augment {data.augment}, lr {schedule.lr:g} ({schedule.name}, {schedule.warmup_epochs:g} epochs of warm-up), {optimizer_told(config.rule)}, weight decay "
        f"{config.rule.weight_decay:g}. Others: --model.recipe"
    )


def build(name: str, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """Make the network `name`, and see that it maps (2, channels, S, S) to (2, num_classes). Raises ConfigError."""
    module = _make(name, num_classes, channels)
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"--model.name {name} gave a {type(module).__name__}: it must return a torch.nn.Module."
        )
    shape = (2, channels, image_size, image_size)
    with (
        torch.no_grad(),
        blamed(
            f"--model.name {name} cannot take images of shape {shape[1:]} (channels, height, width)",
            "Take another network, or other images",
        ),
    ):
        output = module.eval()(torch.zeros(shape))
    demand_scores(name, output, 2, num_classes)
    return module.train()


def demand_scores(
    name: str, output: object, num_images: int, num_classes: int, when: str = ""
) -> None:
    """Raise ConfigError unless a network's output is (num_images, num_classes) floating-point scores."""
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        if isinstance(output, torch.Tensor):
            kind = output.dtype
        else:
            kind = f"a {type(output).__name__}"
        raise ConfigError(
            f"--model.name {name} gives {kind} {when}where scores are needed: it must give a tensor (images, "
            f"{num_classes}) of floats, one for each class."
        )
    if tuple(output.shape) != (num_images, num_classes):
        raise ConfigError(
            f"--model.name {name} gives {tuple(output.shape)} {when}for {num_images} image{'s' * (num_images > 1)}, but the "
            f"data set has {num_classes} classes: its last layer must have {num_classes} outputs."
        )


def outline(name: str, num_classes: int, channels: int) -> nn.Module | None:
    """Return the network of `build`, its parameters on the meta device: shapes without memory; None if it cannot be made so.

    Its buffers are real.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        module = _make(name, num_classes, channels)
    except Exception:  # its code wants to see its parameters
        return None
    finally:
        nn.Module.register_parameter = register
    is_whole = isinstance(module, nn.Module) and not any(
        buffer.is_meta for buffer in module.buffers()
    )
    return module.train() if is_whole else None


def _make(name: str, num_classes: int, channels: int) -> nn.Module:
    with blamed(f"--model.name {name} cannot be made"):
        make = NETWORKS[name][0] if name in NETWORKS else _find(name)
        return make(num_classes, channels)


def _find(name: str):
    """torchvision:NAME or package.module:function(num_classes[, channels])."""
    source, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(f"--model.name {name}: there is no such network. Give one of: {FORMS}.")
    if source == "torchvision":
        known = torchvision_models().list_models(module=torchvision_models())
        if attribute not in known:
            raise ConfigError(
                f"--model.name {name}: torchvision has no classification network {attribute}. It has: "
                f"{', '.join(known)}."
            )
        return _torchvision(attribute)
    try:
        function = getattr(importlib.import_module(source), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--model.name {name}: {error}. The module must be importable from here (is it on "
            "PYTHONPATH?) and hold that function."
        ) from error
    if "channels" in inspect.signature(function).parameters:
        return lambda num_classes, channels: function(num_classes=num_classes, channels=channels)
    return lambda num_classes, channels: function(num_classes=num_classes)
