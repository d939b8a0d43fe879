"""Reading and writing model folders and training state."""

from crosslayer.checkpoint.folder import load, save

__all__ = ["load", "save"]
