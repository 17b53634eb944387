"""How quantization parameters are trained: one file a stage."""
