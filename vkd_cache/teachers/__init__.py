"""Teachers: classification networks and detectors, loaded, checked, frozen, and tapped by node name."""

from vkd_cache.teachers.build import names_code
from vkd_cache.teachers.detector import DetectionTeacher, is_detector, load_detector
from vkd_cache.teachers.loading import load_teacher
from vkd_cache.teachers.teacher import Teacher, load_classifier

__all__ = [
    "DetectionTeacher", "Teacher", "is_detector", "load_classifier", "load_detector", "load_teacher", "names_code",
]
