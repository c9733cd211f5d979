"""Checks training, generation and compiled programs on eight virtual devices.

Run as `python -m tests.distribution.on_eight_devices check_memory`, with the names of checks, which
test_distribution.py does: the number of devices is fixed when JAX starts. Prints the name of each
check that passes.
"""

import collections
import contextlib
import functools
import os
import re
import sys
import tempfile

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import keras
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from keras import ops
from keras.distribution import DataParallel
from keras.distribution import DeviceMesh
from keras.distribution import ModelParallel
from keras.distribution import list_devices

from keras_mamba2 import Mamba2Backbone
from keras_mamba2 import Mamba2CausalLM
from keras_mamba2 import Mamba2Forecaster
from keras_mamba2 import Mamba2HybridBackbone
from keras_mamba2 import load_programs
from keras_mamba2.ops.ssd_jax import ssd
from keras_mamba2.ops.ssd_sequence_parallel import ssd_sequence_parallel
from tests import reference

EPS = np.finfo("float32").eps
LAYERS, T = 1, 64
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def mesh(*shape, axes=("batch", "model")):
    return DeviceMesh(shape, axes, list_devices()[: np.prod(shape)])


def model_parallel(*shape, axes=("batch", "model")):
    return ModelParallel(layout_map=Mamba2Backbone.get_layout_map(mesh(*shape, axes=axes)))


DISTRIBUTIONS = {
    "data": lambda: DataParallel(devices=list_devices()),
    "fully sharded": lambda: model_parallel(8, 1),
    "tensor": lambda: model_parallel(2, 4),
    "sequence": lambda: model_parallel(2, 4, axes=("batch", "sequence")),
    "one sequence": lambda: model_parallel(1, 8, axes=("batch", "sequence")),
}


def make_lm(**changes):
    keras.utils.set_random_seed(0)
    sizes = {"vocabulary_size": 256, "num_layers": LAYERS, "hidden_dim": 32, "state_dim": 8}
    sizes |= {"head_dim": 8, "num_groups": 2, "chunk_size": 4}
    lm = Mamba2CausalLM(Mamba2Backbone(**sizes | changes))
    lm.compile(optimizer=keras.optimizers.AdamW(1e-2), sampler="greedy", weighted_metrics=[])
    return lm


@functools.cache
def data(rows=16, t=T):
    """Packed rows: documents of many lengths, across the borders of devices."""
    rng = np.random.default_rng(0)
    token_ids = rng.integers(256, size=(rows, t + 1))
    segment_ids = np.cumsum(rng.random((rows, t)) < 0.1, axis=1)
    x = {"token_ids": token_ids[:, :-1], "padding_mask": np.ones_like(segment_ids)}
    x["segment_ids"] = segment_ids
    return x, token_ids[:, 1:]


def assert_close(actual, expected, roundings):
    expected = np.asarray(ops.convert_to_numpy(expected))
    np.testing.assert_allclose(actual, expected, 0, roundings * EPS * np.abs(expected).max())


def scope(distribution):
    return contextlib.nullcontext() if distribution is None else distribution.scope()


def train(distribution):
    """Losses, weights and greedy tokens of a model that is trained for three steps."""
    x, y = data()
    with scope(distribution):
        lm = make_lm()
        history = lm.fit(x, y, batch_size=len(y), epochs=3, shuffle=False, verbose=0)
        tokens = None
        if distribution is None or len(distribution.device_mesh.shape) > 1:
            prompts = {"token_ids": x["token_ids"][:2, :8], "padding_mask": np.ones((2, 8))}
            tokens = lm.generate(prompts, max_new_tokens=6, stop_token_ids=None)["token_ids"]
        return history.history["loss"], lm.get_weights(), tokens


def check_training_and_generation():
    losses, weights, tokens = train(None)
    assert losses[-1] < losses[0]
    for name, distribution in DISTRIBUTIONS.items():
        other_losses, other_weights, other_tokens = train(distribution())
        np.testing.assert_allclose(other_losses, losses, rtol=16 * EPS, err_msg=name)
        if other_tokens is not None:
            np.testing.assert_array_equal(other_tokens, tokens, err_msg=name)
        for weight, other in zip(weights, other_weights, strict=True):
            # Adam divides by the size of a gradient: the sign of one near zero is chance, and
            # each of three steps moves a weight by 0.01 at most.
            error = np.abs(weight - other)
            assert np.mean(error > 1e-4) < 1e-2, name
            assert error.max() < 0.07, name


@functools.cache
def program_on(name=None):
    return train_program(None if name is None else DISTRIBUTIONS[name]())


def train_program(distribution, rows=16, t=T):
    """The compiled training step."""
    with scope(distribution):
        lm = make_lm()
        lm.optimizer.build(lm.trainable_variables)
        lm._symbolic_build(data_batch=(*data(rows, t), None))
        kinds = ("trainable", "non_trainable", "optimizer", "metrics")
        state = lm._get_jax_state(**{f"{kind}_variables": True for kind in kinds})

        def put(a):
            layout = distribution.get_data_layout(a.shape)
            return jax.device_put(a, layout.backend_layout)

        batch = jax.tree.map(put if distribution else jax.numpy.asarray, data(rows, t))
        return jax.jit(lm.train_step, donate_argnums=0).lower(state, batch).compile()


def collectives(program, in_loops=None):
    """How many of each kind the program has; only inside or outside of loops, if asked."""
    count = collections.Counter()
    for line in program.as_text().splitlines():
        kind = re.search(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if kind and in_loops in (None, "while/body" in line):
            count[kind[1]] += 1
    return count


def make_hybrid():
    keras.utils.set_random_seed(0)
    backbone = Mamba2HybridBackbone(
        vocabulary_size=256,
        hidden_dim=32,
        blocks=["mamba2+attention", "mlp", "attention", "experts+mlp"],
        sublayers={
            "mamba2": {"state_dim": 8, "head_dim": 8, "num_groups": 2, "chunk_size": 4},
            "attention": {
                "num_query_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "rotary_dim": 4,
            },
            "mlp": {"intermediate_dim": 64},
            "experts": {
                "kind": "mixture_of_experts",
                "intermediate_dim": 16,
                "num_experts": 8,
                "num_experts_per_token": 2,
            },
        },
    )
    lm = Mamba2CausalLM(backbone)
    lm.compile(optimizer=keras.optimizers.SGD(0.1), sampler="greedy", weighted_metrics=[])
    return lm


def check_hybrids():
    """Heads of attention and experts are cut as heads of mixers are."""
    x, y = data()

    def train(distribution):
        with scope(distribution):
            lm = make_hybrid()
            history = lm.fit(x, y, batch_size=len(y), epochs=2, shuffle=False, verbose=0)
            prompts = {"token_ids": x["token_ids"][:2, :8], "padding_mask": np.ones((2, 8))}
            tokens = lm.generate(prompts, max_new_tokens=6, stop_token_ids=None)["token_ids"]
            layouts = {v.path: getattr(v.value.sharding, "spec", None) for v in lm.backbone.weights}
            return history.history["loss"], lm.get_weights(), tokens, layouts

    losses, weights, tokens, _ = train(None)
    for shape in ((8, 1), (2, 4)):
        layout_map = Mamba2HybridBackbone.get_layout_map(mesh(*shape))
        *others, layouts = train(ModelParallel(layout_map=layout_map))
        np.testing.assert_allclose(others[0], losses, rtol=64 * EPS, err_msg=str(shape))
        np.testing.assert_array_equal(others[2], tokens, err_msg=str(shape))
        for weight, other in zip(weights, others[1], strict=True):
            np.testing.assert_allclose(other, weight, atol=1e-4, rtol=0)
    assert layouts["block_2/sublayers/attention/query/kernel"] == PartitionSpec("batch", "model")
    assert layouts["block_3/sublayers/experts/experts_up/kernel"][0] == "model"


def check_collectives():
    """What is exchanged, and that none waits inside the loop over chunks."""
    assert not collectives(program_on())
    # Gradients, all at once.
    assert collectives(program_on("data")) == {"all-reduce": 1}
    # Each matrix is put together once and used forward and backward; the embedding also as the
    # head, and its rows are exchanged for those of the own tokens.
    sharded = collectives(program_on("fully sharded"))
    assert sharded["all-gather"] <= 2 * LAYERS + 2
    assert sharded["all-reduce"] + sharded["reduce-scatter"] <= 2
    assert sharded["collective-permute"] == 0
    # States pass between devices once a layer and direction: a decay and an addition.
    sequence = program_on("one sequence")
    passed = [line for line in sequence.as_text().splitlines() if "shard_map/all_gather" in line]
    assert len([line for line in passed if " all-gather" in line]) == 2 * LAYERS
    for name in ("fully sharded", "sequence"):
        assert not collectives(program_on(name), in_loops=True), name
    # Heads of one group on several devices add up their gradients of B and C: a sum a chunk.
    tensor = collectives(program_on("tensor"), in_loops=True)
    assert set(tensor) <= {"all-reduce"}
    assert tensor["all-reduce"] <= LAYERS


def check_memory():
    """A device's share falls with the number of devices."""
    whole, sharded = (
        program_on(name).memory_analysis().argument_size_in_bytes
        for name in (None, "fully sharded")
    )
    assert sharded < whole / 5
    peaks = []
    for devices in (2, 8):
        distribution = model_parallel(1, devices, axes=("batch", "sequence"))
        program = train_program(distribution, rows=1, t=1024)
        peaks.append(program.memory_analysis().temp_size_in_bytes)
    assert peaks[1] < peaks[0] / 3, peaks


def check_ssd_sequence_parallel():
    rng = np.random.default_rng(0)
    b, t, h, p, g, n = 2, 32, 4, 3, 2, 5
    shapes = {"x": (b, t, h, p), "dt": (b, t, h), "A": (h,), "B": (b, t, g, n), "C": (b, t, g, n)}
    shapes |= {"D": (h,), "initial_state": (b, h, p, n)}
    inputs = {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    inputs["dt"], inputs["A"] = np.abs(inputs["dt"]), -np.abs(inputs["A"])
    required = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    fast = inputs | {"A": inputs["A"] * 1e3}  # whose states die within a few positions
    sharding = NamedSharding(
        mesh(2, 4, axes=("batch", "sequence")).backend_mesh, PartitionSpec("batch", "sequence")
    )
    on_devices = functools.partial(ssd_sequence_parallel, sharding=sharding)

    def loss(op, ids, inputs):
        y, state = op(**inputs, segment_ids=ids, chunk_size=3)
        return (y * np.cos(np.arange(y.size).reshape(y.shape))).sum() + (state**2).sum(), (y, state)

    ids = np.cumsum(rng.random((b, t)) < 0.1, axis=1)
    cases = [(inputs, None), (inputs, ids), (required, None), (required, ids), (fast, ids)]
    for arguments, segment_ids in cases:
        (expected, _), (gradients, results) = (
            jax.jit(jax.grad(functools.partial(loss, op, segment_ids), has_aux=True))(arguments)
            for op in (ssd, on_devices)
        )
        if arguments is fast:  # gradients in A cancel, to nothing that float32 could compare
            assert all(np.isfinite(gradient).all() for gradient in gradients.values())
        else:
            jax.tree.map(functools.partial(assert_close, roundings=64), gradients, expected)
        truth = reference.ssd(**arguments, segment_ids=segment_ids)
        for actual, exact in zip(results, truth, strict=True):
            assert_close(actual, exact, roundings=16)


def check_prefill_of_one_long_sequence():
    x, _ = data(rows=1, t=1024)
    x = {"token_ids": x["token_ids"], "padding_mask": np.ones_like(x["token_ids"])}
    expected = make_lm().prefill(x)
    for name in ("one sequence", "sequence"):  # the second has two devices for its one row
        with DISTRIBUTIONS[name]().scope():
            state = make_lm().prefill(x)
        jax.tree.map(functools.partial(assert_close, roundings=64), state.layers, expected.layers)


def check_bad_meshes_are_refused():
    with pytest.raises(ValueError, match="must be a `keras.distribution.DeviceMesh`.*list"):
        Mamba2Backbone.get_layout_map([8])
    with pytest.raises(ValueError, match="must have an axis 'batch'.*'rows'"):
        Mamba2Backbone.get_layout_map(mesh(8, 1, axes=("rows", "model")))
    with pytest.raises(ValueError, match="either heads or positions.*'model', 'sequence'"):
        Mamba2Backbone.get_layout_map(mesh(2, 2, 2, axes=("batch", "model", "sequence")))
    for shape, changes, message in (
        (
            (1, 8),
            {"vocabulary_size": 257},
            "The 8 devices of mesh axis 'model'.*vocabulary_size=257",
        ),
        ((1, 8), {"head_dim": 16, "num_groups": 1}, "The 8 devices.*num_heads=4"),
        ((8, 1), {"hidden_dim": 20, "head_dim": 5}, "The 8 devices.*'batch'.*hidden_dim=20"),
    ):
        with model_parallel(*shape).scope(), pytest.raises(ValueError, match=message):
            make_lm(**changes)


def check_what_devices_cannot_share_is_refused():
    """Before anything has changed: the model goes on as it was."""
    x, y = data()
    with model_parallel(1, 8).scope():
        lm = make_lm()
        before = lm.get_weights()
        with pytest.raises(ValueError, match="The 8 devices .* packed outputs=84.*in_proj/kernel"):
            lm.quantize("int4")
        assert lm.backbone.quantization_mode is None
        for weight, other in zip(lm.get_weights(), before, strict=True):
            np.testing.assert_array_equal(weight, other)
        lm.quantize("int8")
        lm.evaluate(x, y, batch_size=3, verbose=0)
    with model_parallel(2, 4).scope():
        lm = make_lm()
        odd = {name: rows[:15] for name, rows in x.items()}
        for use in (
            lambda: lm.fit(odd, y[:15], batch_size=8, verbose=0),
            lambda: lm.fit(x, y, batch_size=8, validation_data=(odd, y[:15]), verbose=0),
            lambda: lm.evaluate(x, y, batch_size=3, verbose=0),
            lambda: lm.predict(odd, verbose=0),
        ):
            with pytest.raises(ValueError, match="2 devices share the rows of a batch"):
                use()
        lm.evaluate(odd, y[:15], batch_size=8, steps=1, verbose=0)  # none is left over


def check_what_devices_cannot_share_of_a_series():
    values, targets = np.random.default_rng(0).normal(size=(2, 15, 6, 1)).astype("float32")
    targets, sizes = targets[:, :2], {"hidden_dim": 8, "head_dim": 4, "state_dim": 4}
    with DataParallel(devices=list_devices()).scope():
        forecaster = Mamba2Forecaster(horizon=2, num_layers=1, **sizes)
        forecaster.compile("sgd", "mse")
        both, options = (values, targets), {"batch_size": 8, "verbose": 0}
        for use in (
            lambda **steps: forecaster.fit(*both, **options, **steps),
            lambda **steps: forecaster.evaluate(*both, **options, **steps),
            lambda **steps: forecaster.predict(values, **options, **steps),
        ):
            with pytest.raises(ValueError, match="8 devices share the rows of a batch"):
                use()
        once = {"steps_per_epoch": 1, "validation_data": both, "validation_steps": 1}
        forecaster.fit(*both, **options, **once)
        forecaster.evaluate(*both, **options, steps=1)
        assert forecaster.predict(values, **options, steps=1).shape == (8, 2, 1)


def check_programs_for_one_device():
    """What is exported in a distribution runs without it."""
    x, _ = data()
    prompts = {"token_ids": x["token_ids"][:2, :8], "padding_mask": np.ones((2, 8))}
    with tempfile.TemporaryDirectory() as folder, model_parallel(2, 4).scope():
        lm = make_lm()
        expected = lm.generate(prompts, max_new_tokens=6, stop_token_ids=None)["token_ids"]
        lm.export_programs(f"{folder}/programs", platforms=["cpu"], batch_sizes=[2])
        programs = load_programs(f"{folder}/programs")
        found = programs.generate(prompts, max_new_tokens=6, stop_token_ids=None)["token_ids"]
        np.testing.assert_array_equal(found, expected)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
        print(name, flush=True)
