"""Read and steer emotion concepts inside language models.

>>> import emovec
>>> model, tokenizer = emovec.load_model("smollm2-135m-instruct")     # doctest: +SKIP
>>> bank = emovec.load_bank("smollm2-135m-instruct")                  # doctest: +SKIP
>>> with emovec.attach(model, bank, steer={"calm": 0.05}) as probe:   # doctest: +SKIP
...     out = model.generate(**emovec.encode(tokenizer, "My code fails again."))
>>> probe[0].top(5)                                                   # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emovec.bank import Bank, BankError, BankLayer, Baseline, UnknownConcept, fingerprint, load_bank, shipped_banks
from emovec.guard import Guard, GuardEvent, GuardStop, Refuse, Steer, Stop, Threshold
from emovec.hook import Hook, Probe, attach
from emovec.models import encode, load_model
from emovec.monitor import Reading
from emovec.ops import Operands, Table, apply_
from emovec.steer import Steering, SteeringError, load_profiles

if TYPE_CHECKING:
    from emovec.extraction import extract

__version__ = "0.1.0"

__all__ = [
    "Bank",
    "BankError",
    "BankLayer",
    "Baseline",
    "Guard",
    "GuardEvent",
    "GuardStop",
    "Hook",
    "Operands",
    "Probe",
    "Reading",
    "Refuse",
    "Steer",
    "Steering",
    "SteeringError",
    "Stop",
    "Table",
    "Threshold",
    "UnknownConcept",
    "apply_",
    "attach",
    "encode",
    "extract",
    "fingerprint",
    "load_bank",
    "load_model",
    "load_profiles",
    "shipped_banks",
]


def __getattr__(name: str) -> Any:
    if name == "extract":  # a leaf: nothing of it is loaded until it is asked for
        from emovec.extraction import extract

        return extract
    raise AttributeError(f"module 'emovec' has no attribute {name!r}")
