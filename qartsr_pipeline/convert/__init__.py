"""Makes full-precision folders from published checkpoints, and enlarges images exactly as OSEDiff does.

conversion.py has the two conversions of image models and writes results, with their cards from model_card.py. diffusers_folder.py
and single_file.py read the base model, osediff.py and adapters.py the checkpoint that adapts it. wan.py converts video models,
whose adapters wan_adapters.py merges. osediff_processing.py, which uses osediff_tiles.py, needs none of them.
"""
