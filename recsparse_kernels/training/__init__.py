"""Published training methods for the packed layers, one file each.

Each is a small object with pure schedules and ``step()``; the loop and the optimizer stay the user's.
"""

from . import schedules
from .dynamic_sparse_learning import DynamicSparseLearning, TableChange
from .selection import ScoreStream, Selection, select_largest
