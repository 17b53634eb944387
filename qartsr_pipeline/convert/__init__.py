"""Makes full-precision `QArtSRPipeline` folders from published checkpoints, and enlarges images exactly as OSEDiff does.

conversion.py has the two conversions. diffusers_folder.py and single_file.py read the base model, osediff.py and adapters.py the
checkpoint that adapts it, and output_folder.py and model_card.py write the result. osediff_processing.py needs none of them.
"""
