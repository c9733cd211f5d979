"""The truth: Mamba-2 token by token in float64 numpy, as its equations read.

Notation: `keras_mamba2/ops/ssd.py`.
Nothing of `keras_mamba2` is imported. The two linear operations also take complex numbers, which is
what `gradients` needs.
"""

import numpy as np


def wide(a):
    """`a` in float64, or complex128 where it is complex."""
    return np.asarray(a, np.result_type(a, np.float64))


def ssd(x, dt, A, B, C, D=None, initial_state=None, segment_ids=None):
    b, t, h, p = np.shape(x)
    state = np.zeros((b, h, p, np.shape(B)[-1])) if initial_state is None else wide(initial_state)
    ys = []
    for i in range(t):
        if segment_ids is not None and i > 0:
            goes_on = np.asarray(segment_ids[:, i] == segment_ids[:, i - 1])
            state = state * goes_on[:, None, None, None]
        y, state = ssd_step(x[:, i], dt[:, i], A, B[:, i], C[:, i], D, state=state)
        ys.append(y)
    return np.stack(ys, axis=1), state


def ssd_step(x, dt, A, B, C, D=None, *, state):
    x, dt, A, B, C = map(wide, (x, dt, A, B, C))
    r = x.shape[1] // B.shape[1]
    B, C = np.repeat(B, r, axis=1), np.repeat(C, r, axis=1)  # (b h n)
    decay = np.exp(dt * A)  # (b h)
    new = np.einsum("bh,bhp,bhn->bhpn", dt, x, B)
    state = decay[..., None, None] * wide(state) + new
    y = np.einsum("bhpn,bhn->bhp", state, C)
    return (y if D is None else y + wide(D)[:, None] * x), state


def causal_conv1d(x, kernel, bias=None, conv_state=None, segment_ids=None):
    """Without a mask: what padding must not change is the sequence alone."""
    x, kernel = wide(x), wide(kernel)
    b, t, e = x.shape
    k = len(kernel)
    state = np.zeros((b, k - 1, e)) if conv_state is None else wide(conv_state)
    ys = []
    for i in range(t):
        if segment_ids is not None and i > 0:
            goes_on = np.asarray(segment_ids[:, i] == segment_ids[:, i - 1])
            state = state * goes_on[:, None, None]
        window = np.concatenate([state, x[:, i : i + 1]], axis=1)  # (b k e)
        ys.append((window * kernel).sum(axis=1))
        state = window[:, 1:]
    y = np.stack(ys, axis=1)
    return (y if bias is None else y + wide(bias)), state


def gradients(f, arguments):
    """The gradient of the real function `f(**arguments)` in every argument.

    By a complex step, f'(a) = Im f(a + ih) / h: nothing is subtracted, so h can be so small that
    the result is exact to float64.
    """
    h = 1e-30
    result = {}
    for name, value in arguments.items():
        value = wide(value)
        result[name] = np.zeros(value.shape)
        for index in np.ndindex(value.shape):
            moved = value.astype(complex)
            moved[index] += 1j * h
            result[name][index] = f(**{**arguments, name: moved}).imag / h
    return result


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(x, 0.0)


def gated_rms_normalization(x, scale, gate=None, num_groups=1, epsilon=1e-5):
    x = wide(x)
    if gate is not None:
        x = x * silu(wide(gate))
    size = x.shape[-1] // num_groups
    groups = [x[..., i * size : (i + 1) * size] for i in range(num_groups)]
    rms = [np.sqrt((group**2).mean(axis=-1, keepdims=True) + epsilon) for group in groups]
    normed = [group / root for group, root in zip(groups, rms, strict=True)]
    return np.concatenate(normed, axis=-1) * wide(scale)


def dense(x, weights, name):
    return x @ weights[f"{name}/kernel"] + weights.get(f"{name}/bias", 0.0)


def mixer(x, weights, config, state=(None, None)):
    """The mixer on x `(b t d)`: its output, and the states `(conv, ssm)`.

    Args:
        weights: dict from the variable's path below the mixer, as `in_proj/kernel`, to an array.
        config: the mixer's `get_config()`.
    """
    b, t, _ = np.shape(x)
    n, p, g = config["state_dim"], config["head_dim"], config["num_groups"]
    e = weights["out_proj/kernel"].shape[0]
    z, xBC, dt = np.split(dense(x, weights, "in_proj"), [e, 2 * e + 2 * g * n], axis=-1)

    xBC, conv_state = causal_conv1d(
        xBC, weights["conv_kernel"], weights.get("conv_bias"), conv_state=state[0]
    )
    x, B, C = np.split(silu(xBC), [e, e + g * n], axis=-1)
    low, high = config["time_step_limit"]
    dt = np.clip(softplus(dt + weights["dt_bias"]), low, high)
    y, ssm_state = ssd(
        x.reshape(b, t, e // p, p),
        dt,
        -np.exp(weights["A_log"]),
        B.reshape(b, t, g, n),
        C.reshape(b, t, g, n),
        weights["D"],
        initial_state=state[1],
    )
    y = gated_rms_normalization(
        y.reshape(b, t, e), weights["norm/scale"], z, g, config["layer_norm_epsilon"]
    )
    return dense(y, weights, "out_proj"), (conv_state, ssm_state)


def block(x, weights, config, state=(None, None)):
    normed = gated_rms_normalization(x, weights["norm/scale"], epsilon=config["layer_norm_epsilon"])
    y, state = mixer(normed, below("mixer", weights), config, state)
    return x + y, state


def backbone(token_ids, weights, config):
    """The hidden states `(b t d)`, and a list of the states of the layers."""
    x = weights["token_embedding/embeddings"][token_ids]
    states = []
    for i in range(config["num_layers"]):
        x, state = block(x, below(f"block_{i}", weights), config)
        states.append(state)
    return gated_rms_normalization(
        x, weights["final_norm/scale"], epsilon=config["layer_norm_epsilon"]
    ), states


def below(prefix, weights):
    """The weights under `prefix/`, by the rest of their paths."""
    return {
        path.removeprefix(f"{prefix}/"): value
        for path, value in weights.items()
        if path.startswith(f"{prefix}/")
    }


def weights_of(layer):
    """The weights of a Keras layer or model in float64, by path below it."""
    own = f"{layer.name}/"
    return {
        weight.path.removeprefix(own): np.asarray(weight.numpy(), np.float64)
        for weight in layer.weights
    }


def randomize(layer, seed=0):
    """Gives all weights random values of a trained model's size, so that none is 0 or 1 by luck."""
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        shape = tuple(weight.shape)
        if weight.path.endswith("/kernel"):
            value = rng.normal(size=shape) * shape[0] ** -0.5
        elif weight.path.endswith("A_log"):
            value = np.log(rng.uniform(1, 16, size=shape))
        elif weight.path.endswith("dt_bias"):
            value = rng.uniform(-4, 0, size=shape)
        elif weight.path.endswith("scale"):
            value = rng.uniform(0.5, 1.5, size=shape)
        else:  # embeddings, convolution, D, biases
            value = rng.normal(size=shape) * 0.5
        weight.assign(value)
