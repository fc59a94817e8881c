"""Memory histories of real programs: their format, and the readers and the recorder that make them."""
from .comm import annotate
from .communication import REGISTRATION, Communication, choose
from .format import EVENT, Access, Op, Origin, Trace, TraceWriter
from .infer import import_recording, recognise
from .perf import read_perf
from .player import PLACEMENTS, Replay, replay
from .record import record
from .source import TraceError
from .strace import read_strace
from .tracepoints import read_tracepoints

__all__ = ["EVENT", "PLACEMENTS", "REGISTRATION", "Access", "Communication", "Op", "Origin", "Replay", "Trace", "TraceError",
           "TraceWriter", "annotate", "choose", "import_recording", "read_perf", "read_strace", "read_tracepoints", "recognise",
           "record", "replay"]
