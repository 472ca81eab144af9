"""Making a bank: directions from labelled stories, calibrated on ordinary text."""

from emovec.extraction.calibrate import calibrate
from emovec.extraction.concepts import ConceptExtraction, add_concepts
from emovec.extraction.corpus import CorpusError
from emovec.extraction.evidence import Evidence
from emovec.extraction.plan import Plan
from emovec.extraction.recipe import Recipe
from emovec.extraction.run import Extraction, Summary, extract
from emovec.extraction.state import StateError

__all__ = [
    "ConceptExtraction",
    "CorpusError",
    "Evidence",
    "Extraction",
    "Plan",
    "Recipe",
    "StateError",
    "Summary",
    "add_concepts",
    "calibrate",
    "extract",
]
