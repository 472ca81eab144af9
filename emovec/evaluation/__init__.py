"""Putting a bank on trial: what its readings and its steering are good for, with a null and an interval for each claim."""

from emovec.evaluation.material import Options
from emovec.evaluation.run import Report, evaluate

__all__ = ["Options", "Report", "evaluate"]
