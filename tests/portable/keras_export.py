"""`Backbone.export` of Keras, run by other runtimes: `python keras_export.py FOLDER FORMAT ...`.

Prints for each format the largest difference from the model, and the largest of its numbers.
"""

import json
import pathlib
import sys

import keras
import numpy as np

import keras_mamba2

LENGTH = 40  # three chunks, the last one shorter
keras.utils.set_random_seed(0)
backbone = keras_mamba2.Mamba2Backbone(
    vocabulary_size=64, num_layers=2, hidden_dim=32, state_dim=8, head_dim=8, chunk_size=16
)
inputs = {
    "token_ids": np.arange(2 * LENGTH, dtype="int32").reshape(2, LENGTH) % 64,
    "padding_mask": np.ones((2, LENGTH), "int32"),
}
inputs["padding_mask"][1, 30:] = 0


def tf_saved_model(file):
    import tensorflow as tf

    loaded = tf.saved_model.load(file)  # it owns the variables
    return np.asarray(loaded.serve({name: tf.constant(array) for name, array in inputs.items()}))


def onnx(file):
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    return session.run(None, by_name([(i.name, i.name) for i in session.get_inputs()]))[0]


def by_name(details):
    """The inputs under the keys that a runtime has for them, whose names hold ours."""
    return {key: inputs[next(n for n in inputs if n in name)] for name, key in details}


if __name__ == "__main__":
    folder, *formats = sys.argv[1:]
    expected = keras.ops.convert_to_numpy(backbone(inputs))
    is_token = inputs["padding_mask"].astype(bool)
    any_length = keras.config.backend() == "tensorflow"
    shapes = {"tf_saved_model": (None, None if any_length else LENGTH), "onnx": (2, LENGTH)}
    ends = {"tf_saved_model": "", "onnx": ".onnx"}
    found = {}
    for format in formats:
        signature = {
            name: keras.InputSpec(shape=shapes[format], dtype=array.dtype, name=name)
            for name, array in inputs.items()
        }
        file = str(pathlib.Path(folder) / f"{format}{ends[format]}")
        backbone.export(file, format=format, input_signature=[signature], verbose=False)
        difference = np.abs(globals()[format](file) - expected)[is_token]
        found[format] = float(difference.max()), float(np.abs(expected).max())
    print(json.dumps(found))
