"""The OpenAI-compatible HTTP service over the engine."""

from crosslayer.server.app import Service
from crosslayer.server.chat import ChatTemplate
from crosslayer.server.run import run

__all__ = ["ChatTemplate", "Service", "run"]
