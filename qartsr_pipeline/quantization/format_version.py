"""The version of the stored format of quantized weights (see `deployed`). Free of torch, so that files can be checked quickly."""

FORMAT_VERSION = 1
