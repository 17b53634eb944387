"""Clips without files: frames, the causal autoencoder streamed, windows in time, cuts and colours. Functions on tensors."""
