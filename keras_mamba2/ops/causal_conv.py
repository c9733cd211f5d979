"""Causal depthwise convolution with its state, in `keras.ops`. Notation: `ops/ssd.py`."""

import keras
from keras import ops

from keras_mamba2.ops.channels import scale_channels
from keras_mamba2.ops.checks import check_dtypes
from keras_mamba2.ops.checks import check_shapes
from keras_mamba2.ops.segments import runs


def causal_conv1d(x, kernel, bias=None, conv_state=None, mask=None, segment_ids=None):
    """Convolves each channel of `x` with its own `k` taps, looking back only.

    Padded positions are skipped: they add nothing to later positions, and the returned state
    holds the last `k-1` real inputs of each row.

    Args:
        x: tensor `(b t e)`, here with `e` any number of channels.
        kernel: tensor `(k e)`; the last tap meets the current position.
        bias: optional tensor `(e)`.
        conv_state: optional tensor `(b k-1 e)`, the inputs before the first one, zeros if
            absent.
        mask: optional boolean tensor `(b t)`, true at real positions. The real positions of
            a row must be contiguous: padding on the left, on the right, or on both sides.
        segment_ids: optional integer tensor `(b t)`. A new segment begins where the id differs
            from the one before, padded positions included, and sees nothing of earlier ones.
            `conv_state` belongs to the segment of the first position.

    Returns:
        Tuple `(y, conv_state)`: `y` `(b t e)`, arbitrary at padded positions, and
        `conv_state` `(b k-1 e)`, both in the dtype of `x`.
    """
    check_shapes(
        {
            "x": (x, "b t e"),
            "kernel": (kernel, "k e"),
            "bias": (bias, "e"),
            "conv_state": (conv_state, "b k-1 e"),
            "mask": (mask, "b t"),
            "segment_ids": (segment_ids, "b t"),
        }
    )
    check_dtypes("float", x=x, kernel=kernel, bias=bias, conv_state=conv_state)
    check_dtypes("int", segment_ids=segment_ids)
    _check_conv_state(conv_state, kernel)
    x = ops.convert_to_tensor(x)
    k = kernel.shape[0]
    t = ops.shape(x)[1]
    window = ops.pad(x, [(0, 0), (k - 1, 0), (0, 0)])  # (b t+k-1 e)
    if conv_state is not None:
        conv_state = ops.cast(conv_state, x.dtype)
    if mask is None:
        if conv_state is not None:
            window = ops.concatenate([conv_state, x], axis=1)
        new_state = window[:, t:]
    else:
        mask = ops.cast(mask, "bool")
        first = ops.argmax(ops.cast(mask, "int32"), axis=1)[:, None]  # (b 1)
        count = ops.sum(ops.cast(mask, first.dtype), axis=1, keepdims=True)  # (b 1)
        real = ops.pad(mask, [(0, 0), (k - 1, 0)])[..., None]  # (b t+k-1 1)
        window = ops.where(real, window, ops.zeros((), x.dtype))
        if conv_state is not None:  # it goes right before the first real input
            position = ops.arange(t + k - 1, dtype=first.dtype)
            for i in range(k - 1):
                here = (position == first + i)[..., None]  # (b t+k-1 1)
                window = ops.where(here, conv_state[:, i : i + 1], window)
        end = (first + count)[:, 0]  # (b)
        new_state = _rows_from(window, end, k - 1)

    taps = [window[:, i : i + t] for i in range(k)]
    if segment_ids is not None:
        run = ops.pad(runs(segment_ids), [(0, 0), (k - 1, 0)])  # (b t+k-1)
        here, zero = run[:, k - 1 :], ops.zeros((), x.dtype)
        for i in range(k - 1):
            taps[i] = ops.where((run[:, i : i + t] == here)[..., None], taps[i], zero)
        state_run = run[:, t:] if mask is None else _rows_from(run, end, k - 1)
        new_state = ops.where((state_run == run[:, -1:])[..., None], new_state, zero)
    kernel = ops.cast(kernel, x.dtype)
    y = sum(scale_channels(taps[i], kernel[i]) for i in range(k))
    return (y if bias is None else y + ops.cast(bias, x.dtype)), new_state


def causal_conv1d_step(x, kernel, bias=None, *, conv_state):
    """Runs `causal_conv1d` for one token.

    Args:
        x: tensor `(b e)`.
        kernel: tensor `(k e)`.
        bias: optional tensor `(e)`.
        conv_state: tensor `(b k-1 e)`, the last `k-1` inputs.

    Returns:
        Tuple `(y, conv_state)` of shapes `(b e)` and `(b k-1 e)`, in the dtype of `x`.
    """
    check_shapes(
        {"x": (x, "b e"), "kernel": (kernel, "k e"), "bias": (bias, "e")}
        | {"conv_state": (conv_state, "b k-1 e")}
    )
    check_dtypes("float", x=x, kernel=kernel, bias=bias, conv_state=conv_state)
    _check_conv_state(conv_state, kernel)
    window = ops.concatenate([ops.cast(conv_state, x.dtype), x[:, None]], axis=1)  # (b k e)
    kernel = ops.cast(kernel, x.dtype)
    y = sum(window[:, i] * kernel[i] for i in range(kernel.shape[0]))
    return (y if bias is None else y + ops.cast(bias, x.dtype)), window[:, 1:]


def causal_conv1d_extend(inputs, t: int, kernel, bias=None, *, conv_state, start):
    """Runs `causal_conv1d` for t tokens of an open chunk (`ops/open_chunk.py`).

    Args:
        inputs: tensor `(b q e)`, of the tokens in the chunk.
        t: int, how many of them.
        kernel: tensor `(k e)`.
        bias: optional tensor `(e)`.
        conv_state: tensor `(b k-1 e)`, the inputs before the chunk.
        start: int, or int scalar, the place of the first of the t tokens.

    Returns:
        Tensor `(b t e)`.
    """
    window = ops.concatenate([ops.cast(conv_state, inputs.dtype), inputs], axis=1)
    k = kernel.shape[0]
    seen = ops.slice(window, (0, start, 0), (window.shape[0], t + k - 1, window.shape[2]))
    return causal_conv1d(seen[:, k - 1 :], kernel, bias, conv_state=seen[:, : k - 1])[0]


def causal_conv1d_commit(inputs, *, conv_state, count):
    """The state `(b k-1 e)` after the first `count` `(b)` inputs `(b q e)` of an open chunk."""
    window = ops.concatenate([ops.cast(conv_state, inputs.dtype), inputs], axis=1)
    return _rows_from(window, count, conv_state.shape[1])


def _rows_from(x, start, length):
    """`x[i, start[i] : start[i] + length]` of `(b t ...)`, for every row."""
    if keras.config.backend() == "jax":
        # For a gather the compiler may copy all of x to another layout.
        import jax

        return jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, length))(x, start)
    index = start[:, None] + ops.arange(length, dtype=start.dtype)  # (b length)
    for axis in range(2, len(x.shape)):
        index = ops.expand_dims(index, axis)
    return ops.take_along_axis(x, index, axis=1)


def _check_conv_state(conv_state, kernel):
    k = kernel.shape[0]
    if conv_state is not None and conv_state.shape[1] != k - 1:
        raise ValueError(
            f"`conv_state` must hold the last k-1={k - 1} inputs. Received: "
            f"conv_state.shape={tuple(conv_state.shape)}, kernel.shape={tuple(kernel.shape)}"
        )
