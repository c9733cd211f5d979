"""Keras layers: the mixer and its parts. Notation and shapes: `ops/ssd.py`."""

from keras_mamba2.layers.adapter import Adapter as Adapter
from keras_mamba2.layers.attention import Attention as Attention
from keras_mamba2.layers.attention import AttentionState as AttentionState
from keras_mamba2.layers.fed_block import FedBlock as FedBlock
from keras_mamba2.layers.gated_rms_normalization import (
    GatedRMSNormalization as GatedRMSNormalization,
)
from keras_mamba2.layers.hybrid_block import HybridBlock as HybridBlock
from keras_mamba2.layers.mamba2_block import Mamba2Block as Mamba2Block
from keras_mamba2.layers.mamba2_mixer import Mamba2Mixer as Mamba2Mixer
from keras_mamba2.layers.mamba2_mixer import MixerState as MixerState
from keras_mamba2.layers.mamba2_mixer import RoundedMixerState as RoundedMixerState
from keras_mamba2.layers.mixture_of_experts import MixtureOfExperts as MixtureOfExperts
from keras_mamba2.layers.mlp import MLP as MLP
from keras_mamba2.layers.parallel import Parallel as Parallel
from keras_mamba2.layers.projection import Projection as Projection
from keras_mamba2.layers.residual_block import ResidualBlock as ResidualBlock
from keras_mamba2.layers.reversible_embedding import ReversibleEmbedding as ReversibleEmbedding
from keras_mamba2.layers.shared_transformer import SharedTransformer as SharedTransformer
from keras_mamba2.layers.sublayer import StateTensor as StateTensor
from keras_mamba2.layers.sublayer import Sublayer as Sublayer
