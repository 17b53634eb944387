"""What the commands that train small models share: a run from start to end, and what it says when it ends."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from qartsr_pipeline.calibration.retraining.trainer import Trainer
from qartsr_pipeline.calibration.run_folder import remove_left_over
from qartsr_pipeline.calibration.training.progress import Progress
from qartsr_pipeline.cli.training_bar import TrainingBar
from qartsr_pipeline.folder_lock import FolderLock
from qartsr_pipeline.whole_files import SavingError


def run_training(parser: argparse.ArgumentParser, trainer_of: Callable[[Progress], Trainer], export: str) -> None:
    """Trains under the lock of the run's folder. Ends the process if the run does not get to its end.

    Args:
        parser: says errors; its ``prog`` is the module's name.
        trainer_of: reads the arguments and makes the trainer, at its beginning or where it was left.
        export: the module that writes the model.
    """
    with TrainingBar() as bar:
        try:
            trainer = trainer_of(bar)
        except (OSError, ValueError, ImportError) as error:
            parser.error(" ".join(str(error).split()))
        how, state = f"python -m {parser.prog} --resume --output {trainer.output}", trainer.state_path
        try:
            with FolderLock(trainer.output).take():
                remove_left_over(trainer.output)
                finished = trainer.run()
        except KeyboardInterrupt:
            parser.exit(130, f"\nstopped at once; {state} holds what was saved last. Continue with: {how}\n")
        except SavingError as error:
            parser.exit(1, f"\n{parser.prog}: error: {error} Then continue with: {how}\n")
        except FloatingPointError as error:
            parser.exit(1, f"\n{parser.prog}: error: {error}. A saved state is continued with --resume and other --phases\n")
        except (OSError, ValueError) as error:
            parser.exit(1, f"\n{parser.prog}: error: {error}\n")
    if not finished:
        parser.exit(130, f"\nstopped; saved at {trainer.place} in {state}. Continue with: {how}\n")
    print(f"finished: {state}; write the model with: python -m {export} {state} FOLDER")


def say_written(sizes: Mapping[str, int], folder: str | Path) -> None:
    """Prints the megabytes of an exported folder's components."""
    for name, size in sizes.items():
        print(f"{name:18s} {size / 1e6:7.2f} MB")
    print(f"written: {folder}")
