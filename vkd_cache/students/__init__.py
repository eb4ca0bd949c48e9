"""Students: networks that learn from a cache, by name. Detectors are in `detector`, which needs scipy."""

from vkd_cache.students.checkpoint import load_student_weights, read_torch_file
from vkd_cache.students.factory import create_student
from vkd_cache.students.student import Student, StudentOutput

__all__ = ["Student", "StudentOutput", "create_student", "load_student_weights", "read_torch_file"]
