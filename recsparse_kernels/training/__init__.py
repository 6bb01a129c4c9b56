"""Published training methods for the packed layers, one file each.

Each is a small object with pure schedules and ``step()``; the loop and the optimizer stay the user's.
"""

from . import schedules
from .dense_to_sparse import AdaptiveDenseToSparse, Refresh
from .dense_to_sparse_scores import CostAware, GradientWeighted, Magnitude
from .dynamic_sparse_learning import DynamicSparseLearning, TableChange
from .feature_mimicking import CompressionReport, FeatureMimicking
from .feature_mimicking_fields import FieldEmbeddings
from .growth_pruning import AlternateGrowthPruning, PhaseChange, alternating
from .growth_pruning_units import HiddenUnits, find_hidden_units
from .selection import ScoreStream, Selection, select_largest
from .topology_update import TopologyUpdate, share_inputs
from .topology_update_clusters import ClusterObjective, cluster_labels
