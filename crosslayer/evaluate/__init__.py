"""Measuring a model: loss on held-out text."""

from crosslayer.evaluate.perplexity import Score, score

__all__ = ["Score", "score"]
