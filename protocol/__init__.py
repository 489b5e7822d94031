"""What crosses a process boundary. Imports no torch, no ray, no diffusers."""

__version__ = "0.1.0"
