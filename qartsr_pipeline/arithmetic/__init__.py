"""The integers behind quantization: bounds, codes, packing. Functions on tensors only: no modules, no dispatch."""
