"""Detection: the ViDT network, its losses and what is distilled from it."""

from vkd_cache.detection.vidt import STRIDES, VIDT_NAMES, ViDT, ViDTConfig, ViDTOutput, create_vidt, valid_grids

__all__ = ["STRIDES", "VIDT_NAMES", "ViDT", "ViDTConfig", "ViDTOutput", "create_vidt", "valid_grids"]
