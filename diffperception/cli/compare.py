"""`diffperception compare`."""

from diffperception.training.label_efficiency import compare_label_efficiency

command = compare_label_efficiency
