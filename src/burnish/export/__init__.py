"""Results that load elsewhere: Hugging Face folders, adapters, merged models, each proved."""

from burnish.export.card import ExportFacts
from burnish.export.exporter import Exporter
from burnish.export.final import export_final
from burnish.export.merge import MergeProof, merge

__all__ = ["ExportFacts", "Exporter", "MergeProof", "export_final", "merge"]
