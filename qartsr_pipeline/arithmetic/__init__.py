"""The integers behind quantization: bounds, codes, packing. Functions on tensors only: no modules, no dispatch."""

# Of the stored format (docs/stored_format.md): how codes are packed and what they mean. Here, where it can be read without torch.
FORMAT_VERSION = 2
