"""One door to every teacher: the name says which kind it is."""

from collections.abc import Sequence

from vkd_cache.config import TeacherConfig
from vkd_cache.teachers.detector import DetectionTeacher, is_detector, load_detector
from vkd_cache.teachers.teacher import Teacher, load_classifier


def load_teacher(
    config: TeacherConfig, *, nodes: Sequence[str], num_classes: int, view_px: int
) -> Teacher | DetectionTeacher:
    """Build the teacher that `config` names, with its weights, on the CPU.

    Args:
        config: name, weights, number of classes and input size; see its fields.
        nodes: wanted outputs: `pooled`, `logits`, `feature_map`; of a detector `patch_1` to `patch_4`, `body_det`,
            `neck_det`.
        num_classes: of the source; used where neither the configuration nor the weights say.
        view_px: side of the views; the input size of classification networks that take any.

    Raises:
        TeacherError: unknown name, weights that cannot be had, read or fitted, a node that cannot be tapped, an output
            that is random in evaluation mode.
    """
    if is_detector(config.name):
        return load_detector(config, nodes=nodes, num_classes=num_classes)
    return load_classifier(config, nodes=nodes, num_classes=num_classes, view_px=view_px)
