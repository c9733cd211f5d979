"""Keras layers: the mixer and its parts. Notation and shapes: `ops/ssd.py`."""

from keras_mamba2.layers.gated_rms_normalization import (
    GatedRMSNormalization as GatedRMSNormalization,
)
from keras_mamba2.layers.mamba2_block import Mamba2Block as Mamba2Block
from keras_mamba2.layers.mamba2_mixer import Mamba2Mixer as Mamba2Mixer
from keras_mamba2.layers.mamba2_mixer import MixerState as MixerState
from keras_mamba2.layers.projection import Projection as Projection
from keras_mamba2.layers.residual_block import ResidualBlock as ResidualBlock
from keras_mamba2.layers.reversible_embedding import ReversibleEmbedding as ReversibleEmbedding
from keras_mamba2.layers.sublayer import StateTensor as StateTensor
from keras_mamba2.layers.sublayer import Sublayer as Sublayer
