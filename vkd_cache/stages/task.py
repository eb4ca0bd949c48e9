"""What differs between classification and detection in a training run; all else is one code.

A newcomer would look for a switch in the configuration: there is none. A source with boxes makes a detection run, any
other one a classification run.

Shape legend: b samples of a batch.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from vkd_cache.runtime import JobSplit
from vkd_cache.sources import Source
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.supply import TeacherOutput


class Task(Protocol):
    """A student's task: its network, its inputs and its losses; one object a learner.

    Attributes:
        terms: names of the loss terms, in the order in which they are shown; `total` first.
        metric: the number of `evaluate` that decides which student is the best, percent; a key of
            `journal.METRIC_LABELS`.
        joint: whether `losses` are sums over this rank's part of a batch, over counts of all ranks: then every rank
            calls them equally often, and a rank's samples do not weigh by themselves.
    """

    terms: tuple[str, ...]
    metric: str
    joint: bool

    def create_student(self) -> nn.Module:
        """The student at its initial weights, on the CPU; drawn from torch's global generator."""
        ...

    def compiled(self, student: nn.Module) -> nn.Module:
        """What to call instead of `student`, with torch.compile wherever that pays."""
        ...

    def images(self, batch: FedBatch, pixels: Tensor) -> Any:
        """What student and teacher look at: images in [0, 1], mixed; `pixels` (b, H, W, 3) uint8 on the device."""
        ...

    def idle_images(self, pixels: Tensor) -> Any:
        """Two black images for a rank all of whose images are broken; `pixels` (0, H, W, 3) as in `images`."""
        ...

    def outputs(self, model: nn.Module, images: Any) -> Any:
        """What `model`, a student wrapped or not, makes of `images`."""
        ...

    def losses(self, outputs: Any, batch: FedBatch, teacher: TeacherOutput) -> dict[str, Tensor]:
        """The loss terms that are on, `total` among them: scalars."""
        ...

    def idle_loss(self, outputs: Any) -> Tensor:
        """A loss of zero whose gradient reaches every parameter, so that the other ranks' step can go on."""
        ...

    def evaluate(
        self, model: nn.Module, source: Source, split: JobSplit, between: Callable[[], None]
    ) -> dict[str, float]:
        """Percent by metric, over all samples of `source` and all ranks; `between` is called before each batch."""
        ...
