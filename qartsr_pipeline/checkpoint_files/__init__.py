"""Checkpoint folders: bringing them here, looking them over before anything is loaded, and fingerprinting them when written.

Nothing in this package imports torch: a damaged or foreign folder is reported before seconds are spent on imports and loading.
"""

from qartsr_pipeline.checkpoint_files.checking import check_checkpoint, is_quantized, quantization_configs
from qartsr_pipeline.checkpoint_files.download import DEFAULT_CHECKPOINT, fetch, shipped_checkpoints
from qartsr_pipeline.checkpoint_files.errors import CheckpointError
from qartsr_pipeline.checkpoint_files.integrity import CHECKSUMS_NAME, write_checksums

__all__ = [
    "CHECKSUMS_NAME",
    "DEFAULT_CHECKPOINT",
    "CheckpointError",
    "check_checkpoint",
    "fetch",
    "is_quantized",
    "quantization_configs",
    "shipped_checkpoints",
    "write_checksums",
]
