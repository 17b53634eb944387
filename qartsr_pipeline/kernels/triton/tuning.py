"""Which block sizes are tried. One is chosen, by measuring, for a layer's shape and a power of two of rows."""

from __future__ import annotations

import triton

from qartsr_pipeline.kernels.triton import interpreted


def _product(rows: int, outputs: int, inputs: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": rows, "BLOCK_N": outputs, "BLOCK_K": inputs}, num_warps=warps, num_stages=stages)


# A signed-byte product needs 32 inputs at least. 32 inputs serve the layers whose channels are no multiple of 64.
PRODUCT_CONFIGS = [
    _product(128, 128, 64, 8, 3),
    _product(128, 128, 128, 8, 3),
    _product(256, 64, 64, 8, 3),
    _product(128, 64, 64, 4, 4),
    _product(64, 128, 64, 4, 4),
    _product(64, 64, 128, 4, 4),
    _product(64, 64, 64, 4, 4),
    _product(128, 64, 32, 4, 4),
    _product(64, 64, 32, 4, 4),
]
QUANTIZE_CONFIGS = [
    triton.Config({"BLOCK_M": rows, "BLOCK_C": channels}, num_warps=4, num_stages=2)
    for rows, channels in ((128, 32), (64, 64), (32, 64), (32, 128), (16, 128))
]
if interpreted():  # one small configuration: what is proven does not depend on the block size, and nothing can be measured
    PRODUCT_CONFIGS = [_product(16, 16, 32, 4, 1)]
    QUANTIZE_CONFIGS = [triton.Config({"BLOCK_M": 16, "BLOCK_C": 32})]


def _whole_blocks(configs: list[triton.Config], named_args: dict, **arguments: object) -> list[triton.Config]:
    """Of the configurations whose blocks cut the channels without a remainder, those with the largest; aligned layers need it."""
    channels = {**named_args, **arguments}["CHANNELS"]
    whole = [config for config in configs if channels % config.kwargs["BLOCK_K"] == 0]
    larger = [config for config in whole if config.kwargs["BLOCK_K"] > 32]
    return larger or whole or [config for config in configs if config.kwargs["BLOCK_K"] == 32]


def size_class(rows: int) -> int:
    """Rows rounded up to a power of two: images of similar size share one choice."""
    return triton.next_power_of_2(rows)


def rank_block(rank: int) -> int:
    """Ranks that a 16-bit product takes at a time: a power of two, 16 at least."""
    return min(64, max(16, triton.next_power_of_2(rank)))


def autotune_product(keys: list[str]):
    """Decorator of a product kernel; ``keys`` names the arguments that choices are kept for."""
    return triton.autotune(PRODUCT_CONFIGS, keys, prune_configs_by={"early_config_prune": _whole_blocks})


def autotune_quantize(keys: list[str]):
    """The same for the quantize kernel."""
    return triton.autotune(QUANTIZE_CONFIGS, keys)
