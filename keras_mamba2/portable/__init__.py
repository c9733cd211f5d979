"""Programs that `Mamba2CausalLM.export_programs` wrote, run without Keras: JAX and files.

Imports of this package, of `host` and of what they use bring neither Keras nor TensorFlow.
"""

from keras_mamba2.portable.programs import Programs as Programs
from keras_mamba2.portable.programs import load_programs as load_programs
from keras_mamba2.portable.state import ProgramState as ProgramState
