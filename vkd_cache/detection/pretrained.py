"""A Swin classifier's weights as the start of a ViDT's body.

A newcomer's trap: timm names the merging between two stages after the later one, the Swin and ViDT authors after the
earlier. Loaded as it is, a timm file would leave one merging at random weights, and the others would not fit.

Source: the reference starts its bodies so, without saying what was left out; here every entry is accounted for.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vkd_cache.detection.vidt import ViDT
from vkd_cache.errors import CheckpointError
from vkd_cache.weights import bare_tensors, innermost, misfits

_MERGING = re.compile(r"layers\.(\d+)\.downsample\.")
_CLASSIFIER = ("norm.", "head.")
_FOLLOWS = ("relative_position_index", "attn_mask")  # buffers that follow from sizes
# of a detector alone: [DET] tokens, what is done with their positions, a fourth merging, and what takes no part
_OF_DETECTORS = re.compile(
    r"det_token|det_pos_embed|.*\.det_pos_linear\.|layers\.3\.downsample\.|.*\.downsample\.(expansion|norm2)\.|norm\d\."
)


def load_body_weights(model: ViDT, state: Mapping[str, Any], *, where: str) -> tuple[str, ...]:
    """Start a detector's body from a Swin classifier of the same widths, depths and window.

    Args:
        model: its neck, heads and [DET] tokens keep the weights they have.
        state: a state dict with the names of the Swin authors or of timm, plain or under `model` or `state_dict`.
        where: what to call it in an error, normally its path.

    Returns:
        Names of the entries that a body has no place for: the classifier's last norm and head.

    Raises:
        CheckpointError: not the weights of a Swin classifier, or of one with another body.
    """
    named = _names_of_authors(bare_tensors(innermost(state), where, CheckpointError))
    apart = tuple(name for name in named if name.startswith(_CLASSIFIER))
    found = {
        name: value for name, value in named.items() if not name.startswith(_CLASSIFIER) and not name.endswith(_FOLLOWS)
    }
    own = model.backbone.state_dict()
    wanted = {
        name: value for name, value in own.items() if not name.endswith(_FOLLOWS) and not _OF_DETECTORS.match(name)
    }
    problems = misfits(found, wanted)
    if problems:
        raise CheckpointError(
            f"{where}: is no Swin classifier with the body of this ViDT ({model.config.body_width} channels, "
            f"{'-'.join(map(str, model.config.depths))} blocks, windows of 7): {'; '.join(problems)}."
        )
    model.backbone.load_state_dict({**own, **found}, strict=True)
    return apart


def _names_of_authors(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names as the Swin authors have them: a merging belongs to the stage before it."""
    if any(name.startswith("layers.0.downsample.") for name in named):
        return dict(named)
    return {
        _MERGING.sub(lambda match: f"layers.{int(match[1]) - 1}.downsample.", name): value
        for name, value in named.items()
    }
