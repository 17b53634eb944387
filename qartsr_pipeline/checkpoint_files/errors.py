"""The one exception that every problem of a checkpoint folder raises."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message says what was found, why that does not work, and the ways out."""
