"""Measuring a model: loss on held-out text, standard task sets, recall over a distance."""

from crosslayer.evaluate.perplexity import Score, score
from crosslayer.evaluate.recall import score_recall
from crosslayer.evaluate.tasks import TASKS, score_tasks

__all__ = ["TASKS", "Score", "score", "score_recall", "score_tasks"]
