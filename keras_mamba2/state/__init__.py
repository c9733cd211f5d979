"""What a model remembers of a text, as a pytree and as a file. Knows no model class."""

from keras_mamba2.state.mamba2_state import NO_TOKEN as NO_TOKEN
from keras_mamba2.state.mamba2_state import STATE as STATE
from keras_mamba2.state.mamba2_state import Mamba2State as Mamba2State
from keras_mamba2.state.open_chunk import OpenChunk as OpenChunk
