"""The truth: Mamba-2 token by token in float64 numpy, as its equations read.

Notation: `keras_mamba2/ops/ssd.py`.
Nothing of `keras_mamba2` is imported. The two linear operations also take complex numbers, which is
what `gradients` needs.
"""

import math

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


def gated_rms_normalization(
    x, scale, gate=None, num_groups=1, epsilon=1e-5, norm_before_gate=False
):
    x = wide(x)
    if gate is not None and norm_before_gate:
        normed = gated_rms_normalization(x, scale, None, num_groups, epsilon)
        return normed * silu(wide(gate))
    if gate is not None:
        x = x * silu(wide(gate))
    size = x.shape[-1] // num_groups
    groups = [x[..., i * size : (i + 1) * size] for i in range(num_groups)]
    rms = [np.sqrt((group**2).mean(axis=-1, keepdims=True) + epsilon) for group in groups]
    normed = [group / root for group, root in zip(groups, rms, strict=True)]
    return np.concatenate(normed, axis=-1) * wide(scale)


def rotated(x, position, dims, base):
    """The first `dims` dimensions of heads `(... p)` turned: the halves are the pairs."""
    angles = position * base ** (-np.arange(0, dims, 2) / dims)
    a, b = x[..., : dims // 2], x[..., dims // 2 : dims]
    turned = [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)]
    return np.concatenate([*turned, x[..., dims:]], axis=-1)


def attention(x, weights, config):
    """Causal attention on x `(b t d)`, query by query and head by head."""
    b, t, _ = np.shape(x)
    h, g, p = (config[k] for k in ("num_query_heads", "num_key_value_heads", "head_dim"))
    scale = p**-0.5 if config["scale"] is None else config["scale"]
    parts = [adapted(wide(x), weights, name) for name in ("query", "key", "value")]
    if config["conv_kernel_size"]:
        qkv = np.concatenate(parts, axis=-1)
        qkv, _ = causal_conv1d(qkv, weights["conv_kernel"], weights["conv_bias"])
        parts = np.split(qkv, [h * p, (h + g) * p], axis=-1)
    q, k, v = (part.reshape(b, t, -1, p) for part in parts)
    k = k * config["key_multiplier"]
    for heads in (q, k):
        for i in range(t):
            heads[:, i] = rotated(
                heads[:, i], i, config["rotary_dim"], config["rope_max_wavelength"]
            )
    y = np.zeros_like(q)
    for row, i, head in np.ndindex(b, t, h):
        group = head // (h // g)
        scores = k[row, : i + 1, group] @ q[row, i, head] * scale
        likely = np.exp(scores - scores.max())
        y[row, i, head] = likely / likely.sum() @ v[row, : i + 1, group]
    return dense(y.reshape(b, t, h * p), weights, "output")


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


ACTIVATIONS = {"silu": silu, "squared_relu": lambda x: np.maximum(x, 0) ** 2, "gelu": gelu}


def mlp(x, weights, config):
    activation = ACTIVATIONS[config["activation"]]
    x, f = wide(x), config["intermediate_dim"]
    added = np.zeros(2 * f)
    if config["adapter_rank"] is not None:
        added = adapter(x, weights, "adapter")
    up = dense(x, weights, "up") + added[..., -f:]
    if not config["gated"]:
        return dense(activation(up), weights, "down")
    gate = (dense(x, weights, "gate") + added[..., :f]) * config["gate_multiplier"]
    return dense(activation(gate) * up, weights, "down")


def adapter(x, weights, name):
    return dense(dense(x, weights, f"{name}/adapter_down"), weights, f"{name}/adapter_up")


def adapted(x, weights, name):
    """A projection, with what an adapter adds if there is one."""
    y = dense(x, weights, name)
    if f"{name}_adapter/adapter_down/kernel" in weights:
        y = y + adapter(x, weights, f"{name}_adapter")
    return y


def mixture_of_experts(x, weights, config):
    """Token by token, expert by expert."""
    x = wide(x)
    y = np.zeros_like(x)
    for index in np.ndindex(x.shape[:-1]):
        token = x[index]
        inner = token if config["latent_dim"] is None else dense(token, weights, "latent_down")
        total = 0
        for expert, weight in routes(token, weights, config):
            total = total + weight * _expert(inner, expert, weights, config)
        if config["latent_dim"] is not None:
            total = dense(total, weights, "latent_up")
        y[index] = total
    return y


def routes(token, weights, config):
    """The experts of one token with their weights."""
    k, logits = config["num_experts_per_token"], token @ weights["router"]
    if config["scoring"] == "softmax":
        best = np.argsort(-logits)[:k]
        weight = np.exp(logits[best] - logits[best].max())
        weight = weight / weight.sum()
    else:
        scores = 1 / (1 + np.exp(-logits))
        choice = (scores + weights["router_bias"]).reshape(config["num_expert_groups"], -1)
        value = np.sort(choice, axis=1)[:, -2:].sum(axis=1)
        kept = np.argsort(-value)[: config["num_groups_per_token"]]
        outside = [i for i in range(len(choice)) if i not in kept]
        choice[outside] = -np.inf
        best = np.argsort(-choice.reshape(-1))[:k]
        weight = scores[best]
        if config["normalize_weights"]:
            weight = weight / weight.sum()
    return list(zip(best, weight * config["weights_multiplier"], strict=True))


def _expert(x, expert, weights, config):
    activation = ACTIVATIONS[config["activation"]]
    up = x @ weights["experts_up/kernel"][expert]
    gate = x @ weights["experts_gate/kernel"][expert] if config["gated"] else None
    inner = activation(up) if gate is None else activation(gate) * up
    return inner @ weights["experts_down/kernel"][expert]


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
    projected = dense(x, weights, "in_proj")
    if config.get("projection_multipliers"):
        sizes = (e, e, g * n, g * n, e // p)
        projected = projected * np.repeat(config["projection_multipliers"], sizes)
    z, xBC, dt = np.split(projected, [e, 2 * e + 2 * g * n], axis=-1)

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
    y = y.reshape(b, t, e)
    gated_norm = config.get("gated_norm", "after_gate")
    if gated_norm == "none":
        y = y * silu(z)
    else:
        before = gated_norm == "before_gate"
        scale, epsilon = weights["norm/scale"], config["layer_norm_epsilon"]
        y = gated_rms_normalization(y, scale, z, g, epsilon, before)
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
        elif "/experts_" in weight.path:
            value = rng.normal(size=shape) * shape[1] ** -0.5
        elif weight.path.endswith("A_log"):
            value = np.log(rng.uniform(1, 16, size=shape))
        elif weight.path.endswith("dt_bias"):
            value = rng.uniform(-4, 0, size=shape)
        elif weight.path.endswith("scale"):
            value = rng.uniform(0.5, 1.5, size=shape)
        else:  # embeddings, convolution, D, biases
            value = rng.normal(size=shape) * 0.5
        weight.assign(value)
