import keras

from keras_mamba2.ops import ssd


def distributed_ssd(path: str, x, dt, A, B, C, D, **options):
    """`ops.ssd`, on several devices where the current `keras.distribution` lays it out so.

    A layout map names the layouts of `<path>/x`, `<path>/dt`, `<path>/B` and `<path>/C`. They are
    set here, before the loop over the chunks, or XLA would exchange B and C anew in each. If that
    of `x` `(b t h p)` cuts `t`, and its devices divide it, each runs its own part of the sequence.

    Args:
        path: string, of the layer that computes it. The others are those of `ops.ssd`.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return ssd(x, dt, A, B, C, D, **options)

    layouts = [
        _for_rows(distribution.get_tensor_layout(f"{path}/{name}"), x.shape[0])
        for name in ("x", "dt", "B", "C")
    ]
    x, dt, B, C = (
        a if layout is None else keras.distribution.distribute_tensor(a, layout)
        for a, layout in zip((x, dt, B, C), layouts, strict=True)
    )
    of_x = layouts[0]
    axis = None if of_x is None else of_x.axes[1]
    if of_x is None or axis is None or x.shape[1] % _size(of_x.device_mesh, axis):
        return ssd(x, dt, A, B, C, D, **options)
    # Distribution is JAX's alone: there is no such module to import on other backends.
    from keras_mamba2.ops.ssd_sequence_parallel import ssd_sequence_parallel

    return ssd_sequence_parallel(x, dt, A, B, C, D, **options, sharding=of_x.backend_layout)


def _for_rows(
    layout: keras.distribution.TensorLayout | None, b: int | None
) -> keras.distribution.TensorLayout | None:
    """`layout`, which cuts the batch only if its devices divide that: one prompt has one row."""
    if layout is None or layout.axes[0] is None or b is None:
        return layout
    if b % _size(layout.device_mesh, layout.axes[0]) == 0:
        return layout
    return keras.distribution.TensorLayout((None, *layout.axes[1:]), layout.device_mesh)


def _size(mesh: keras.distribution.DeviceMesh, axis: str) -> int:
    return mesh.shape[mesh.axis_names.index(axis)]
