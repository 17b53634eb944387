"""Makes full-precision `QArtSRPipeline` folders from published checkpoints, and enlarges images exactly as OSEDiff does.

conversion.py has the two conversions and writes the result, with its card from model_card.py. diffusers_folder.py and
single_file.py read the base model, osediff.py and adapters.py the checkpoint that adapts it. osediff_processing.py, which uses
osediff_tiles.py, needs none of them.
"""
