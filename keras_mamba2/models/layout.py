"""How a backbone is laid out on a mesh of devices, in `keras.distribution`."""

from collections.abc import Mapping
from collections.abc import Sequence
from types import SimpleNamespace

import keras
from keras.distribution import DeviceMesh
from keras.distribution import LayoutMap

from keras_mamba2.layers.sublayer import Sublayer


def layout_map(
    sublayers: Sequence[type[Sublayer]],
    device_mesh: DeviceMesh,
    model: str,
    data: str,
    sequence: str,
) -> LayoutMap:
    """See `Mamba2Backbone.get_layout_map`. `sublayers` are the kinds that it may have."""
    if not isinstance(device_mesh, DeviceMesh):
        raise ValueError(
            "`device_mesh` must be a `keras.distribution.DeviceMesh`. "
            f"Received: {device_mesh} of type {type(device_mesh).__name__}"
        )
    sizes = dict(zip(device_mesh.axis_names, device_mesh.shape, strict=True))
    if data not in sizes:
        raise ValueError(
            f"The mesh must have an axis {data!r} for the batch, which may have the size 1. "
            f"Received: axis_names={device_mesh.axis_names}"
        )
    model, sequence = (name if name in sizes else None for name in (model, sequence))
    if model and sequence:
        raise ValueError(
            "A mesh cuts either heads or positions, besides the batch. "
            f"Received: axis_names={device_mesh.axis_names}"
        )
    # Devices that would hold the same weights divide them, and get the others' parts when needed.
    weights = sequence if sequence and sizes[sequence] > sizes[data] else data
    axes = {"batch": data, "sequence": sequence, "model": model, "weights": weights, None: None}
    layouts = LayoutMap(device_mesh)
    layouts[".*token_embedding/embeddings"] = (model, weights)
    layouts[".*token_embedding/reverse_embeddings"] = (weights, model)
    # Without a word on the residual stream XLA would cut it as the weights are, and exchange
    # activations at every matrix product instead of weights.
    layouts[".*(embeddings_dropout|block_[0-9]+|block_[0-9]+/norm)/output"] = (data, sequence)
    for sublayer in sublayers:
        for path, names in sublayer.layouts.items():
            layouts[f".*/{path}$"] = tuple(axes[name] for name in names)
    return layouts


def check_layout(variables: Mapping[str, Mapping[str, int]]) -> None:
    """Raises if the current distribution would cut a variable into unequal parts.

    Args:
        variables: for the path of each, its axes: what they are, and their sizes.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return
    mesh = distribution.device_mesh
    for path, axes in variables.items():
        variable = SimpleNamespace(path=path, shape=tuple(axes.values()))
        layout = distribution.get_variable_layout(variable)
        for (name, size), mesh_axis in zip(axes.items(), layout.axes, strict=True):
            if mesh_axis is None:
                continue
            devices = mesh.shape[mesh.axis_names.index(mesh_axis)]
            if size % devices:
                raise ValueError(
                    f"The {devices} devices of mesh axis {mesh_axis!r} do not divide "
                    f"{name}={size}, along which {path!r} is cut. Choose another mesh, or a "
                    "layout map that does not cut it."
                )
