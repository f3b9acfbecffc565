"""Networks of diffusers, run by diffusers itself, as generators of ours: sources of features by configuration alone."""
