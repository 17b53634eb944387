"""Checkpoint folders: finding or downloading them, checking that they are complete and undamaged, and writing their checksums.

Importing this package does not import torch, so a damaged or foreign folder is reported before seconds are spent on loading.
"""

from qartsr_pipeline.checkpoint_files.checking import check_checkpoint, is_quantized, quantization_configs
from qartsr_pipeline.checkpoint_files.download import DEFAULT_CHECKPOINT, fetch, label_of, shipped_checkpoints, shipped_labels
from qartsr_pipeline.checkpoint_files.integrity import CHECKSUMS_NAME, CheckpointError, write_checksums

__all__ = [
    "CHECKSUMS_NAME",
    "DEFAULT_CHECKPOINT",
    "CheckpointError",
    "check_checkpoint",
    "fetch",
    "is_quantized",
    "label_of",
    "quantization_configs",
    "shipped_checkpoints",
    "shipped_labels",
    "write_checksums",
]
