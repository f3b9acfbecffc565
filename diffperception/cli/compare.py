"""`diffperception compare`."""

from diffperception.training.label_efficiency import compare_label_efficiency as command

__all__ = ["command"]
