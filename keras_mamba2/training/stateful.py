"""Truncated back-propagation through time: training on a stream, with the state carried over."""

import keras
import numpy as np
from keras import ops
from keras import tree

from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import are_ids
from keras_mamba2.arguments import check_elements
from keras_mamba2.arguments import check_keywords
from keras_mamba2.arguments import check_numeric
from keras_mamba2.arguments import shown
from keras_mamba2.training.kept_weights import KeptWeights
from keras_mamba2.training.loss_scaling import scaled


class ConsecutiveWindows(keras.utils.PyDataset):
    """Cuts one long text into batches of windows, each going on where the one before ended.

    The text is cut into `batch_size` parts of equal length, which are read side by side: row `i`
    of a batch continues row `i` of the batch before. Tokens of a part that do not fill a window are
    left out.

    Args:
        token_ids: int array `(n)`.
        batch_size: int, b.
        window: int, t, tokens per row.

    Example:
    ```python
    windows = keras_mamba2.training.ConsecutiveWindows(token_ids, batch_size=8, window=512)
    x, y = windows[0]  # x["token_ids"] (8 512), y (8 512), the tokens after each
    ```
    """

    def __init__(self, token_ids, batch_size: int, window: int, **kwargs):
        check_keywords(ConsecutiveWindows, kwargs)
        super().__init__(**kwargs)
        batch_size, window = SIZE("batch_size", batch_size), SIZE("window", window)
        token_ids = _checked_ids(token_ids)
        if token_ids.ndim != 1 or len(token_ids) <= batch_size * window:
            raise ValueError(
                f"`token_ids` must be one row of more than batch_size * window = "
                f"{batch_size * window} tokens. Received: shape={token_ids.shape}"
            )
        self.batch_size = batch_size
        self.window = window
        part = (len(token_ids) - 1) // batch_size
        starts = part * np.arange(batch_size)[:, None]
        self._rows = token_ids[starts + np.arange(part + 1)]

    @property
    def largest_id(self) -> int:
        return int(self._rows.max())

    def __len__(self) -> int:
        return (self._rows.shape[1] - 1) // self.window

    def __getitem__(self, index: int):
        here = index * self.window
        rows = self._rows[:, here : here + self.window + 1]
        token_ids = rows[:, :-1]
        return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}, rows[:, 1:]


def _checked_ids(token_ids) -> np.ndarray:
    """As int32, if that changes nothing: NaN and 1.5 would become some token."""
    try:
        token_ids = np.asarray(token_ids)
    except ValueError:  # rows of different lengths
        token_ids = np.asarray(token_ids, object)
    check_numeric("`token_ids`", token_ids)
    check_elements(
        token_ids,
        are_ids(token_ids, np.iinfo("int32").max),
        "`token_ids` must be whole numbers, and not negative.",
    )
    return token_ids.astype("int32")


class StatefulTraining(KeptWeights, keras.Model):
    """Trains a language model on a stream of windows, each after the state of the one before.

    Gradients stop at the beginning of a window, its context does not. The model is trained in
    place. The state is reset at the start of each epoch, and of each evaluation and prediction.

    Args:
        lm: a `keras_mamba2.Mamba2CausalLM`.
        batch_size: int, b, rows of every batch.
        **kwargs: see `keras.Model`.

    Call arguments:
        inputs: dict of `token_ids` and `padding_mask`, int tensors `(b t)`, and optionally
            `segment_ids`, which restart the state as in `Mamba2Backbone`. Returns logits
            `(b t v)`.

    Example:
    ```python
    windows = keras_mamba2.training.ConsecutiveWindows(token_ids, batch_size=8, window=512)
    training = keras_mamba2.training.StatefulTraining(lm, batch_size=8)
    training.compile(keras_mamba2.training.adamw_recipe(1e-3, steps=4 * len(windows)))
    training.fit(windows, epochs=4)
    lm.generate("Once upon a time")
    ```
    """

    def __init__(self, lm, batch_size: int, **kwargs):
        check_keywords(type(self), kwargs)
        super().__init__(**kwargs)
        if not hasattr(lm, "backbone"):
            raise ValueError(f"`lm` must be a `Mamba2CausalLM`. Received: lm={shown(lm)}")
        if any(spec.room_axis is not None for spec in tree.flatten(lm.backbone.state_spec())):
            raise ValueError(
                "Attention keeps something of every token, and would need room for a whole epoch. "
                "Train a model with attention on documents, with `lm.fit`. "
                f"Received: lm={shown(lm)}"
            )
        self.lm = lm
        self.batch_size = SIZE("batch_size", batch_size)
        self._state = tree.map_structure(
            self._add_weight_for, lm.backbone.initial_state(self.batch_size)
        )
        self._reading = _Called(self._read)
        self.built = True

    def _add_weight_for(self, leaf):
        dtype = keras.backend.standardize_dtype(leaf.dtype)
        options = {"trainable": False, "autocast": False}
        return self.add_weight(leaf.shape, "zeros", dtype, name="state", **options)

    def reset_state(self) -> None:
        """Sets the state to that before the first token."""
        initial_state = self.lm.backbone.initial_state(self.batch_size)
        tree.map_structure(lambda weight, leaf: weight.assign(leaf), self._state, initial_state)

    def compile(
        self, optimizer="adamw", loss="auto", auto_scale_loss: bool = True, **kwargs
    ) -> None:
        """As `keras.Model.compile`; `"auto"` is the loss of the next token."""
        if loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = keras.optimizers.get(optimizer)
        # Keras would ask the policy of this model, which is not that of `lm`.
        if auto_scale_loss:
            optimizer = scaled(optimizer, self.lm.dtype_policy)
        super().compile(optimizer=optimizer, loss=loss, auto_scale_loss=False, **kwargs)

    def call(self, inputs, training=None):
        shape = tuple(inputs["token_ids"].shape)
        if shape[0] not in (None, self.batch_size):
            raise ValueError(
                f"Every batch must have batch_size={self.batch_size} rows. Received: shape={shape}"
            )
        return self._reading(inputs, training=training)

    def _read(self, inputs):
        token_ids, padding_mask = inputs["token_ids"], inputs["padding_mask"]
        backbone = self.lm.backbone
        state = tree.map_structure(ops.convert_to_tensor, self._state)
        hidden_states, state = backbone.call_with_state(
            token_ids, state, padding_mask, inputs.get("segment_ids")
        )
        tree.map_structure(
            lambda weight, leaf: weight.assign(ops.stop_gradient(leaf)), self._state, state
        )
        return self.lm.logits(hidden_states)

    def fit(self, x=None, *args, callbacks=None, **kwargs) -> keras.callbacks.History:
        """As `keras.Model.fit`, in order: `x` is not shuffled."""
        self._check_windows(x)
        callbacks = [*tree.flatten(callbacks or []), _ResetState(self)]
        return super().fit(x, *args, callbacks=callbacks, **{**kwargs, "shuffle": False})

    def evaluate(self, x=None, *args, **kwargs):
        """As `keras.Model.evaluate`."""
        self._check_windows(x)
        self.reset_state()
        return super().evaluate(x, *args, **kwargs)

    def predict(self, x=None, *args, **kwargs):
        """As `keras.Model.predict`."""
        self._check_windows(x)
        self.reset_state()
        return super().predict(x, *args, **kwargs)

    def _check_windows(self, x) -> None:
        """Refuses ids that are no tokens: JAX would take others for them."""
        num_tokens = self.lm.num_tokens
        if isinstance(x, ConsecutiveWindows) and x.largest_id >= num_tokens:
            raise ValueError(
                f"`token_ids` must be below num_tokens={num_tokens}. Received: {x.largest_id}"
            )


class _Called(keras.layers.Layer):
    """Runs a function as a layer runs, so that the layers inside know whether they train."""

    def __init__(self, function):
        super().__init__(autocast=False)
        self._function = function
        self.built = True

    def call(self, inputs):
        return self._function(inputs)


class _ResetState(keras.callbacks.Callback):
    def __init__(self, training: StatefulTraining):
        super().__init__()
        self._training = training

    def on_epoch_begin(self, epoch, logs=None):
        self._training.reset_state()
