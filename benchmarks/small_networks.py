"""Small networks of torchvision's classes, to train with AdamW on 28 x 28 pixels: `--model benchmarks.small_networks:vit`."""

from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vision_transformer import VisionTransformer


def vit(num_classes: int, channels: int) -> nn.Module:
    """A vision transformer: 16 patches, 4 layers of 64, 139,000 parameters."""
    module = VisionTransformer(
        image_size=28,
        patch_size=7,
        num_layers=4,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
        num_classes=num_classes,
    )
    module.conv_proj = nn.Conv2d(channels, 64, 7, 7)
    return module


def convnext(num_classes: int, channels: int) -> nn.Module:
    """Two stages of 32 and 64 channels, 103,000 parameters."""
    blocks = [CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 2)]
    module = ConvNeXt(blocks, num_classes=num_classes)
    module.features[0][0] = nn.Conv2d(channels, 32, 4, 4)
    return module
