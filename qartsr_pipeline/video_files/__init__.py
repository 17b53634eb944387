"""Video files, as the command line reads and writes them: frame times, sound, colours and bits are kept, what is lost is said.

`reading` looks at a clip and decodes it, `writing` takes the enlarged frames. Both need torch, and PyAV when a clip is opened
(`pip install 'qartsr[video]'`); the names below need neither. Frames are float32 in [0, 1]; the pipelines that enlarge them are
not known here.
"""

from qartsr_pipeline.video_files.clip import CLIP_SUFFIXES, VideoFileError, import_av
from qartsr_pipeline.video_files.formats import CODECS, CONTAINERS, check_codec
from qartsr_pipeline.video_files.image_sequence import complete_sequence, is_pattern

__all__ = [
    "CLIP_SUFFIXES",
    "CODECS",
    "CONTAINERS",
    "VideoFileError",
    "check_codec",
    "complete_sequence",
    "import_av",
    "is_pattern",
]
