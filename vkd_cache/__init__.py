"""Offline-teacher distillation for vision: run the teacher once, train any number of VkD students from the cache.

What a program needs from it is below; each name is imported when it is first used, so `import vkd_cache` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vkd_cache.cache.reader import open_cache
    from vkd_cache.losses import VkdLoss
    from vkd_cache.students import create_student
    from vkd_cache.views.plan import plan_view

__version__ = "0.1.0"
__all__ = ["VkdLoss", "__version__", "create_student", "open_cache", "plan_view"]

_HOMES = {
    "VkdLoss": "vkd_cache.losses",
    "create_student": "vkd_cache.students",
    "open_cache": "vkd_cache.cache.reader",
    "plan_view": "vkd_cache.views.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vkd_cache' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # looked up once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
