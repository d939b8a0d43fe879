"""Training: a config, a recipe, and the loop."""

from crosslayer.train.config import Recipe, TrainConfig, make_model_config
from crosslayer.train.loop import train

__all__ = ["Recipe", "TrainConfig", "make_model_config", "train"]
