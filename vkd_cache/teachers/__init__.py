"""Teachers: timm models and callables, loaded, checked, frozen, and tapped by node name."""

from vkd_cache.teachers.teacher import Teacher, load_teacher

__all__ = ["Teacher", "load_teacher"]
