"""Training: the only package that imports lightning, and not before something is trained."""
