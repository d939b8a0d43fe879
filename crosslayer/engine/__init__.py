"""Serving a model on one machine: continuous batching over a paged cache."""

from crosslayer.engine.config import EngineConfig
from crosslayer.engine.engine import Engine
from crosslayer.engine.llm import LLM, Completion
from crosslayer.engine.request import Output, Request, SamplingParams, TokenLogprobs

__all__ = ["LLM", "Completion", "Engine", "EngineConfig", "Output", "Request", "SamplingParams", "TokenLogprobs"]
