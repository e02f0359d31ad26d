"""trimtab: exact, visible expert balancing for Mixture-of-Experts models."""

from trimtab.balancer import Balancer
from trimtab.bias import CentredSign, Momentum, Proportional, Quantile, Sign
from trimtab.integrations.attach import attach, balancer_of
from trimtab.integrations.families import Family
from trimtab.losses import (
    BatchWise,
    CommunicationLevel,
    DeviceLevel,
    GlobalBatch,
    ImportanceCV,
    Objective,
    SequenceWise,
    ZLoss,
)
from trimtab.scale import Accumulation, GradReduction

__version__ = "0.1.0"

__all__ = [
    "Accumulation",
    "Balancer",
    "BatchWise",
    "CentredSign",
    "CommunicationLevel",
    "DeviceLevel",
    "Family",
    "GlobalBatch",
    "GradReduction",
    "ImportanceCV",
    "Momentum",
    "Objective",
    "Proportional",
    "Quantile",
    "SequenceWise",
    "Sign",
    "ZLoss",
    "attach",
    "balancer_of",
]
