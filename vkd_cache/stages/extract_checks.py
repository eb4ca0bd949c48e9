"""Whether what an extraction is asked for fits its data: teacher, view recipe, nodes and stored types.

A newcomer would look for a switch between classification and detection: there is none. The source says which one it
is, and all else has to go with it; every misfit is said at once, before anything slow begins.
"""

from vkd_cache.config import CacheConfig, Config
from vkd_cache.detection.canvas import NODES, PATCHES
from vkd_cache.detection.vidt import VIDT_NAMES
from vkd_cache.errors import ConfigError
from vkd_cache.sources import Source, is_detection
from vkd_cache.stages.layout import detection_source
from vkd_cache.teachers import is_detector
from vkd_cache.views.recipe import Recipe

_CLASSIFICATION_NODES = ("pooled", "logits", "feature_map")


def nodes_to_store(cache: CacheConfig, source: Source) -> tuple[str, ...]:
    """The nodes that are asked for, or those of the source's task where none are named."""
    return cache.nodes or (NODES if is_detection(source) else ("pooled",))


def share_of(node: str, cache: CacheConfig) -> float:
    """The share of a node's tokens that is stored: det tokens are few, so all of them are."""
    return cache.tokens if node in PATCHES else 1.0


def check_fit(config: Config, source: Source, recipe: Recipe) -> None:
    """Refuse settings of one task for data of the other.

    Raises:
        ConfigError: all of them, in one message.
    """
    problems = _misfits(config, source)
    try:
        detection_source(source, recipe)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def _misfits(config: Config, source: Source) -> list[str]:
    detection, cache = is_detection(source), config.cache
    data = f"{source.location} is a {'COCO data set' if detection else 'data set of classes'}"
    problems = []
    if is_detector(config.teacher.name) != detection:
        kind = "a detector" if detection else "a classification network"
        names = f" ({', '.join(VIDT_NAMES)})" if detection else ""
        problems.append(f"[teacher] name: found '{config.teacher.name}', but {data}: expected {kind}{names}.")
    known = NODES if detection else _CLASSIFICATION_NODES
    alien = [node for node in cache.nodes if node not in known]
    if alien:
        problems.append(
            f"[cache] nodes: found {', '.join(alien)}, but {data}: expected some of {', '.join(known)}, or none for "
            "the usual ones."
        )
    if detection and cache.dtype in ("uint8", "uint4"):
        problems.append(
            f"[cache] dtype: found '{cache.dtype}', but tokens are signed: expected int8, auto or a floating type."
        )
    if cache.tokens < 1 and not set(nodes_to_store(cache, source)) & set(PATCHES):
        problems.append(
            f"[cache] tokens: found {cache.tokens:g}, but no node of patch tokens is stored: expected 1, or some of "
            f"{', '.join(PATCHES)} (of a COCO data set) among [cache] nodes."
        )
    return problems
