"""Training: a recipe, the loop, averages of weights, checkpoints, logs."""

from mdiff.core.training.simple import OPTIMIZERS as OPTIMIZERS
from mdiff.core.training.simple import Budget as Budget
from mdiff.core.training.simple import averaged as averaged
from mdiff.core.training.simple import begin as begin
from mdiff.core.training.simple import ema_decay as ema_decay
from mdiff.core.training.simple import train as train
