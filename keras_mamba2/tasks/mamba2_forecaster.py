import math
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mamba2._compat.keras_training import evaluates_within_fit
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import check_elements
from keras_mamba2.arguments import check_keywords
from keras_mamba2.arguments import check_numeric
from keras_mamba2.arguments import integer
from keras_mamba2.arguments import several
from keras_mamba2.arguments import shown
from keras_mamba2.layers import GatedRMSNormalization
from keras_mamba2.layers import Mamba2Block
from keras_mamba2.layers.projection import CALIBRATED_MODES
from keras_mamba2.models import quantization
from keras_mamba2.ops.checks import float32_at_least
from keras_mamba2.saving import AtomicPreset
from keras_mamba2.saving import AtomicSave
from keras_mamba2.tasks.batch_checks import check_samples
from keras_mamba2.tasks.batch_checks import check_weights
from keras_mamba2.tasks.batch_checks import parts_of
from keras_mamba2.tasks.compile_config import compile_config
from keras_mamba2.tasks.compile_config import compile_from_config
from keras_mamba2.tasks.datasets import check_batches_of
from keras_mamba2.tasks.datasets import is_dataset
from keras_mamba2.tasks.model_preset import ModelPreset
from keras_mamba2.training.kept_weights import KeptWeights
from keras_mamba2.training.loss_scaling import ScalesLoss


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2Forecaster(AtomicPreset, AtomicSave, KeptWeights, ScalesLoss, ModelPreset, keras.Model):
    """Forecasts time series: the next values of some features, many steps at once.

    Each feature of each row is scaled by the mean and the deviation of its own observed values,
    and forecasts are scaled back, so that the forecast of `a * x + c` is `a * forecast + c` for
    any positive `a`. The forecast of a constant series is its value.

    It is a model by itself, not a head over a `Mamba2Backbone`: backbones embed token ids, and
    pretrained ones have read text only. It shares the residual block with them, and is saved and
    loaded as the other tasks are, with `save_to_preset` and `from_preset`.

    Values may be missing. Steps before the first observed one do not belong to the series. Later,
    a missing value is read as the mean, next to a flag that it is missing. A missing value in a
    target counts as an error of 0: it has no gradient, and lowers the reported means.

    Losses and metrics are in the units of the targets. If these differ much between targets or
    rows, bring the series to one unit first, or those with the largest values dominate the loss.

    Args:
        horizon: int, the number of steps forecast.
        num_features: int, f, the features of the inputs.
        output_features: which features are forecast: an int n for the first n, or a sequence of
            indices. `None` for all.
        num_layers: int.
        hidden_dim: int, d.
        state_dim: int, n, the size of the state of each channel.
        head_dim: int, p, channels a head; divides expansion * hidden_dim.
        num_groups: int, g, groups of heads that share B and C; divides the number of heads.
        expansion: float, the inner size is expansion * hidden_dim.
        conv_kernel_size: int, k.
        chunk_size: int, positions computed at once. `None` takes the value that is fast on the
            platform.
        dropout: float, the rate at which the outputs of mixers are dropped in training.
        **kwargs: `name`, `dtype` and `trainable`. Inputs and outputs are scaled, and the last
            layer is computed, in float32 whatever the dtype policy.

    Call arguments:
        inputs: float tensor `(b t f)`, with NaN (or infinity) for what is missing; or a dict of
            such `values` and a boolean `mask` `(b t f)` or `(b t)`, true where they are observed.
            Returns `(b horizon o)`. A feature without any observed value is forecast as 0, and
            refused by `fit`, `evaluate` and `predict` on arrays.

    Example:
    ```python
    forecaster = keras_mamba2.Mamba2Forecaster(horizon=24, num_features=3, output_features=1)
    forecaster.compile(optimizer=keras.optimizers.Adam(1e-3), loss="mae")
    forecaster.fit(windows, next_days)  # (b 168 3), (b 24 1)
    forecaster.predict(windows)  # (b 24 1)
    forecaster.save_to_preset("demand")  # and Mamba2Forecaster.from_preset("demand")
    ```

    Reference:
        - [Dao and Gu, 2024](https://arxiv.org/abs/2405.21060)
        - [Kim et al., 2022](https://openreview.net/forum?id=cGDAkQo1C0p), of the scaling
    """

    def __init__(
        self,
        horizon: int,
        num_features: int = 1,
        output_features: int | Sequence[int] | None = None,
        num_layers: int = 2,
        hidden_dim: int = 64,
        state_dim: int = 32,
        head_dim: int = 16,
        num_groups: int = 1,
        expansion: float = 2,
        conv_kernel_size: int = 4,
        chunk_size: int | None = None,
        dropout: float = 0.0,
        **kwargs,
    ):
        check_keywords(type(self), kwargs)
        # Inputs are not cast: 1003 would be 1000 in bfloat16.
        super().__init__(autocast=False, **kwargs)
        self.horizon = SIZE("horizon", horizon)
        self.num_features = SIZE("num_features", num_features)
        self.output_features = _indices(output_features, self.num_features)
        self.num_layers = SIZE("num_layers", num_layers)
        self.block_arguments: dict[str, Any] = {
            "hidden_dim": SIZE("hidden_dim", hidden_dim),
            "state_dim": state_dim,
            "head_dim": head_dim,
            "num_groups": num_groups,
            "expansion": expansion,
            "conv_kernel_size": conv_kernel_size,
            "chunk_size": chunk_size,
            "dropout": dropout,
        }

        hidden_dim = self.block_arguments["hidden_dim"]
        self.embedding = keras.layers.Dense(hidden_dim, dtype=self.dtype_policy, name="embedding")
        self.blocks = [
            Mamba2Block(
                **self.block_arguments,
                num_residual_layers=self.num_layers,
                dtype=self.dtype_policy,
                name=f"block_{i}",
            )
            for i in range(self.num_layers)
        ]
        self.norm = GatedRMSNormalization(dtype=self.dtype_policy, name="final_norm")
        self.head = keras.layers.Dense(
            self.horizon * len(self.output_features), dtype=self._scaling_dtype, name="head"
        )
        self.build()

    def build(self, input_shape=None):
        self.embedding.build((None, None, 2 * self.num_features))
        hidden_dim = self.block_arguments["hidden_dim"]
        for block in self.blocks:
            block.build((None, None, hidden_dim))
        self.norm.build((None, hidden_dim))
        self.head.build((None, hidden_dim))
        self.built = True

    @property
    def _scaling_dtype(self) -> str:
        return float32_at_least(self.compute_dtype)

    def call(self, inputs, training=None):
        values, observed = self._observations(inputs)  # (b t f), (b t f)
        scaled, mean, scale = _standardize(values, observed)  # (b t f), (b 1 f), (b 1 f)
        begun = ops.cumsum(ops.cast(ops.any(observed, axis=-1), "int32"), axis=1) > 0  # (b t)
        flags = ops.cast(observed, scaled.dtype)
        x = self.embedding(ops.concatenate([scaled, flags], axis=-1))  # (b t d)
        for block in self.blocks:
            x = block(x, padding_mask=begun, training=training)
        y = self.head(self.norm(x[:, -1]))  # (b horizon*o)
        y = ops.reshape(y, (-1, self.horizon, len(self.output_features)))
        mean, scale = (ops.take(a, self.output_features, axis=-1) for a in (mean, scale))
        return mean + scale * y

    def _observations(self, inputs):
        """The values, zero where missing, and whether they are observed: both `(b t f)`."""
        values, mask = self._values_and_mask(inputs)
        observed = ops.isfinite(values)
        if mask is not None:
            observed = ops.logical_and(observed, ops.cast(mask, "bool"))
        values = ops.cast(values, self._scaling_dtype)
        return ops.where(observed, values, ops.zeros_like(values)), observed

    def _values_and_mask(self, inputs):
        if not isinstance(inputs, dict):
            values, mask = inputs, None
        elif set(inputs) == {"values", "mask"}:
            values, mask = inputs["values"], inputs["mask"]
            if len(mask.shape) == 2:
                mask = mask[..., None]  # (b t 1)
        else:
            raise ValueError(
                f"A dict of inputs holds `values` and `mask`. Received: {sorted(inputs)}"
            )
        shape = tuple(values.shape)
        if len(shape) != 3 or shape[1] == 0 or shape[2] != self.num_features:
            raise ValueError(
                f"Inputs must have shape (b t f), with t > 0 and f = num_features = "
                f"{self.num_features}. Received: shape={shape}"
            )
        if mask is not None and tuple(mask.shape) not in (shape, (*shape[:2], 1)):
            raise ValueError(
                f"`mask` must have the shape {shape} of `values`, or {shape[:2]}. "
                f"Received: shape={tuple(inputs['mask'].shape)}"
            )
        return values, mask

    def fit(self, x=None, y=None, batch_size: int | None = None, *args, **kwargs):
        validation_data = kwargs.get("validation_data")
        if isinstance(validation_data, tuple):
            vx, vy, weights = keras.utils.unpack_x_y_sample_weight(validation_data)
            size = kwargs.get("validation_batch_size") or batch_size
            rows = self._checked(vx, vy, weights)
            _check_batches(vx, size, kwargs.get("validation_steps"))
            kwargs["validation_data"] = keras.utils.pack_x_y_sample_weight(*rows)
        x, y, _ = self._checked(x, y, kwargs.get("sample_weight"))
        if not kwargs.get("validation_split"):  # else it is split before it is cut into batches
            _check_batches(x, batch_size, kwargs.get("steps_per_epoch"))
        return super().fit(x, y, batch_size, *args, **kwargs)

    def evaluate(self, x=None, y=None, batch_size: int | None = None, *args, **kwargs):
        if not evaluates_within_fit(kwargs):  # else `fit` has checked them
            x, y, _ = self._checked(x, y, kwargs.get("sample_weight"))
            _check_batches(x, batch_size, kwargs.get("steps"))
        return super().evaluate(x, y, batch_size, *args, **kwargs)

    def predict(self, x=None, batch_size: int | None = None, *args, **kwargs):
        x = self._checked_inputs(x)
        _check_batches(x, batch_size, kwargs.get("steps"))
        return super().predict(x, batch_size, *args, **kwargs)

    def _checked(self, x, y, sample_weight):
        """The data, whole numbers as floats, for which JAX has more room. Looks at arrays only."""
        x = self._checked_inputs(x)
        if y is None and isinstance(x, (np.ndarray, dict)):
            raise ValueError("Targets are missing. Received: y=None")
        if sample_weight is not None:
            check_weights(ops.convert_to_numpy(sample_weight))
        return x, self._as_floats("Targets", y), sample_weight

    def _checked_inputs(self, x):
        """Raises for a row that lacks all values of a feature to forecast."""
        if not _gives_batches(x):
            check_samples(x)
        if not all(isinstance(part, np.ndarray) for part in parts_of(x)):
            return x
        values, mask = self._values_and_mask(x)
        values = self._as_floats("Values", values)
        observed = np.isfinite(values) & (True if mask is None else mask.astype(bool))
        missing = np.argwhere(~observed[:, :, self.output_features].any(axis=1))
        if len(missing):
            row, i = missing[0]
            raise ValueError(
                f"Row {row} has no observed value of feature {self.output_features[i]}, so there "
                f"is nothing to forecast it from. Leave out such rows: there are "
                f"{len(np.unique(missing[:, 0]))} in {len(values)}."
            )
        return {**x, "values": values} if isinstance(x, dict) else values

    def _as_floats(self, what: str, array):
        """An array of numbers that Keras keeps: those beyond its floats would be infinite."""
        if not isinstance(array, np.ndarray):
            return array
        check_numeric(what, array)
        dtype = np.result_type(self._scaling_dtype, keras.config.floatx())
        with np.errstate(over="ignore"):
            floats = array.astype(dtype, copy=False)
        too_large = np.isfinite(array) & ~np.isfinite(floats)
        check_elements(array, ~too_large, f"{what} must be below {np.finfo(dtype).max:.2g}.")
        return array if array.dtype.kind == "f" else floats

    def quantize(self, mode: str | None = None, config=None, filters=None, **kwargs) -> None:
        """Quantizes the projections of the blocks, as `Mamba2CausalLM.quantize`.

        Raises:
            ValueError: as there, and for GPTQ and AWQ, which calibrate with texts.
        """
        if config.mode in CALIBRATED_MODES:
            raise ValueError(
                "GPTQ and AWQ of Keras calibrate with texts, which a forecaster does not read. "
                f"Quantize it to 'int8' or 'int4'. Received: mode={config.mode!r}"
            )
        filters = quantization.checked_filters(self, config, filters)
        super().quantize(mode, config=config, filters=filters, **kwargs)
        quantization.remember_policies(self)

    def get_compile_config(self) -> dict:
        return compile_config(super().get_compile_config(), self)

    def compile_from_config(self, config: dict) -> None:
        compile_from_config(self, config)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        y, y_pred = self._known(y, y_pred)
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return super().compute_metrics(x, *self._known(y, y_pred), sample_weight)

    def _known(self, y, y_pred):
        """Targets and forecasts, both the forecasts as constants where targets are missing."""
        if tuple(y.shape[1:]) != tuple(y_pred.shape[1:]):  # or they would be broadcast
            raise ValueError(
                "Targets must have shape (b horizon o), as the outputs, "
                f"{tuple(y_pred.shape)}. Received: shape={tuple(y.shape)}"
            )
        y, constant = ops.cast(y, y_pred.dtype), ops.stop_gradient(y_pred)
        is_known = ops.isfinite(y)
        return ops.where(is_known, y, constant), ops.where(is_known, y_pred, constant)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "horizon": self.horizon,
                "num_features": self.num_features,
                "output_features": self.output_features,
                "num_layers": self.num_layers,
                **self.block_arguments,
            }
        )
        return config


def _check_batches(x, batch_size: int | None, steps: int | None) -> None:
    if not _gives_batches(x):
        check_batches_of(x, batch_size, steps)


def _gives_batches(x) -> bool:
    """Whether `x` is what Keras reads batch by batch: a dataset, a generator, a data loader.

    To look into one would take its batches away, or read all of them.
    """
    is_read = is_dataset(x) or isinstance(x, (keras.utils.PyDataset, Iterable))
    return is_read and not isinstance(x, (Sequence, Mapping)) and not hasattr(x, "shape")


def _indices(output_features, num_features: int) -> tuple[int, ...]:
    if output_features is None:
        output_features = num_features
    try:
        if isinstance(output_features, (Sequence, np.ndarray)):
            indices = several(integer(0, num_features - 1)).standard(output_features)
        else:
            indices = tuple(range(integer(1, num_features).standard(output_features)))
        if len(set(indices)) != len(indices) or not indices:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            "`output_features` must be a number of features, or their indices, from the "
            f"num_features={num_features} of the inputs. Received: {shown(output_features)}"
        ) from None
    return indices


def _standardize(values, observed):
    """Brings the observed values of each row and feature to mean 0 and deviation 1.

    Returns:
        Tuple `(scaled, mean, scale)`, `scaled` `(b t f)` with zeros where nothing is observed, the
        others `(b 1 f)`. The scale of values that do not vary is 0.
    """
    count = ops.sum(ops.cast(observed, values.dtype), axis=1, keepdims=True)
    count = ops.maximum(count, 1)
    # First to between 0 and 1, so that sums of large values, or of large squares, lose nothing. The
    # result depends neither on `least` nor on `unit`, so they need no gradient.
    least = ops.min(ops.where(observed, values, math.inf), axis=1, keepdims=True)
    least = ops.stop_gradient(ops.where(ops.isfinite(least), least, 0.0))
    shifted = ops.where(observed, values - least, 0.0)
    unit = ops.stop_gradient(ops.max(shifted, axis=1, keepdims=True))
    varies = unit > 0
    unit = ops.where(varies, unit, 1.0)
    shifted = shifted / unit
    mean = ops.sum(shifted, axis=1, keepdims=True) / count
    centered = ops.where(observed, shifted - mean, 0.0)
    variance = ops.sum(ops.square(centered), axis=1, keepdims=True) / count
    # Ones before the root and the division: the derivatives of both are infinite at 0.
    scale = ops.sqrt(ops.where(varies, variance, 1.0))
    return centered / scale, least + mean * unit, ops.where(varies, scale * unit, 0.0)
