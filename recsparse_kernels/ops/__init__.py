"""Public functions: argument checks, autograd and fake functions, and the choice of a backend."""

from .fan_in import (
    FanInUpdate,
    fan_in_linear,
    fan_in_linear_update,
    fan_in_loss,
    fan_in_loss_step,
    fan_in_rewire,
    fan_in_score,
    fan_in_topk,
)
from .low_rank import low_rank_cross, low_rank_linear
from .low_rank_embedding import low_rank_embedding, low_rank_embedding_bag, low_rank_fields
from .masked_embedding import (
    FusedOptimizer,
    masked_embedding,
    masked_embedding_bag,
    masked_embedding_matmul_t,
    masked_embedding_pack,
    masked_embedding_propagate,
    masked_embedding_repack,
    masked_embedding_unpack,
)
from .masked_embedding_records import (
    MaskedRecords,
    masked_embedding_bag_frozen,
    masked_embedding_freeze,
    masked_embedding_frozen,
    masked_embedding_thaw,
)
from .masked_embedding_table import MaskedTable
from .sparse24 import (
    sparse24_compress,
    sparse24_compress_both,
    sparse24_decompress,
    sparse24_from_torch,
    sparse24_gather,
    sparse24_is_transposable,
    sparse24_linear,
    sparse24_linear_ste,
    sparse24_mask,
    sparse24_prune,
    sparse24_prune_both,
    sparse24_transpose,
)
