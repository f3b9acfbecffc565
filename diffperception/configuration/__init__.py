"""From configuration files and command lines to the arguments of functions and classes."""
