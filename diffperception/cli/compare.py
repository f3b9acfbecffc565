"""`diffperception compare`."""

from diffperception.training.label_efficiency import compare_label_efficiency

compare = compare_label_efficiency
