"""What makes a stock diffusers model quantized: schemes, folding, calibrating and deployed layers, loading."""
