"""Training: a config, a recipe, and the loop."""

from crosslayer.train.config import Recipe, TrainConfig, make_model_config
from crosslayer.train.loop import train
from crosslayer.train.processes import Processes, joined_processes

__all__ = ["Processes", "Recipe", "TrainConfig", "joined_processes", "make_model_config", "train"]
