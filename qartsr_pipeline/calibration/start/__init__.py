"""How quantization parameters begin: observers, bounds, smoothing, ranks, branches."""
