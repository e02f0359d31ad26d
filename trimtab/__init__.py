"""trimtab: exact, visible expert balancing for Mixture-of-Experts models."""

from trimtab.audit import Audit, audit
from trimtab.balancer import Balancer
from trimtab.bias import CentredSign, Momentum, Proportional, Quantile, Sign
from trimtab.device_losses import CommunicationLevel, DeviceLevel
from trimtab.experts import ClampedSwiGLU, Experts, GeGLU, SharedExperts, SwiGLU
from trimtab.host_copies import HostCopies
from trimtab.integrations.attach import attach, balancer_of
from trimtab.integrations.families import Family
from trimtab.integrations.record_replay import record_routing, replay_routing
from trimtab.losses import BatchWise, GlobalBatch, ImportanceCV, SequenceWise, ZLoss
from trimtab.moe import MoE
from trimtab.objective import Objective
from trimtab.ranks import TokenRanks
from trimtab.router import Router
from trimtab.scale import Accumulation, GradReduction

__version__ = "0.1.0"

__all__ = [
    "Accumulation",
    "Audit",
    "Balancer",
    "BatchWise",
    "CentredSign",
    "ClampedSwiGLU",
    "CommunicationLevel",
    "DeviceLevel",
    "Experts",
    "Family",
    "GeGLU",
    "GlobalBatch",
    "GradReduction",
    "HostCopies",
    "ImportanceCV",
    "MoE",
    "Momentum",
    "Objective",
    "Proportional",
    "Quantile",
    "Router",
    "SequenceWise",
    "SharedExperts",
    "Sign",
    "SwiGLU",
    "TokenRanks",
    "ZLoss",
    "attach",
    "audit",
    "balancer_of",
    "record_routing",
    "replay_routing",
]
