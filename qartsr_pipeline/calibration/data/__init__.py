"""Training and calibration images: photographs, procedural images, images in memory, and how they are degraded.

The names and sizes below are here because command lines need them before anything heavy is imported.
"""

DEGRADATION_NAMES = ("bicubic", "realesrgan", "photo", "real")  # the keys of `degradations.DEGRADATIONS`
SCALE = 4  # the enlargement: a low-resolution image has a quarter of the sides
MULTIPLE = 16  # the network takes images whose sides are multiples of this many pixels
