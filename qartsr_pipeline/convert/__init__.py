"""Published checkpoints become full-precision `QArtSRPipeline` folders. Used by the command line, imported by nothing else.

osediff.py and adapters.py read OSEDiff's checkpoint and merge it; base.py and single_file.py read the model it adapts;
output_folder.py and model_card.py write the result.
"""
