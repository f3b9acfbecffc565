"""Plug-ins for the libraries that users of diffusion models live in; each is imported only when asked for."""
