"""What makes a stock diffusers model quantized: schemes, folding, calibrating and deployed layers, loading.

Importing this package registers the quantization method "qartsr" with diffusers: stock ``from_pretrained`` then loads our models.
"""

from qartsr_pipeline.quantization.diffusers_quantizer import register

register()
