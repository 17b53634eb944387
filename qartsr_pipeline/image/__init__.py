"""Images without the network: conversion, resampling, tiles, colour and alpha. Plain functions on tensors.

What is defined here is free of torch: image files are read before torch is imported.
"""

from __future__ import annotations

GREY_WEIGHTS = (0.299, 0.587, 0.114)  # BT.601 full range, what Pillow's own conversion to "L" uses
