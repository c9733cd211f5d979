"""Checks of what the public operations get: names and values, before anything is computed."""

from collections.abc import Mapping

from keras.backend import standardize_dtype

from keras_mamba2.arguments import SIZE


def float32_at_least(dtype) -> str:
    """The dtype of decays and states: float32, or float64 where the inputs are."""
    return "float64" if standardize_dtype(dtype) == "float64" else "float32"


def check_shapes(layouts: Mapping[str, tuple]) -> None:
    """Raises unless every letter stands for one size in `{name: (tensor, "b t h p")}`.

    No axis may be empty but that of `k-1`, the inputs that a kernel of one tap remembers.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (tensor, layout) in layouts.items():
        if tensor is None:
            continue
        letters = layout.split()
        if not hasattr(tensor, "shape") or not hasattr(tensor, "dtype"):
            raise ValueError(
                f"`{name}` must be a tensor or an array of shape ({layout}). "
                f"Received: {type(tensor).__name__}"
            )
        shape = tuple(tensor.shape)
        if len(shape) != len(letters):
            raise ValueError(f"`{name}` must have shape ({layout}). Received: shape={shape}")
        for letter, size in zip(letters, shape, strict=True):
            if size == 0 and letter != "k-1":
                raise ValueError(
                    f"`{name}` must have shape ({layout}), where {letter} is at least one. "
                    f"Received: {name}.shape={shape}"
                )
            known, owner = sizes.setdefault(letter, (size, name))
            if size is not None and known is not None and size != known:
                raise ValueError(
                    f"`{name}` must have shape ({layout}) with {letter}={known}, as in "
                    f"`{owner}`. Received: {name}.shape={shape}"
                )


def check_dtypes(kind: str, **tensors) -> None:
    """Raises unless the dtypes are of a kind, "float" or "int".

    In integers, what is computed would be cut to them too.
    """
    for name, tensor in tensors.items():
        if tensor is not None and kind not in str(tensor.dtype):
            raise ValueError(
                f"`{name}` must have a dtype of {kind}s. Received: {name}.dtype={tensor.dtype}"
            )


def check_groups(h: int, g: int) -> None:
    if h % g:
        raise ValueError(
            f"The number of groups must divide the number of heads. Received: {g} groups "
            f"in `B` and `C`, {h} heads in `x`"
        )


def check_ssd_arguments(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size) -> None:
    check_shapes(
        {
            "x": (x, "b t h p"),
            "dt": (dt, "b t h"),
            "A": (A, "h"),
            "B": (B, "b t g n"),
            "C": (C, "b t g n"),
            "D": (D, "h"),
            "initial_state": (initial_state, "b h p n"),
            "segment_ids": (segment_ids, "b t"),
        }
    )
    check_dtypes("float", x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state)
    check_dtypes("int", segment_ids=segment_ids)
    check_groups(x.shape[2], B.shape[2])
    SIZE("chunk_size", chunk_size)


def check_ssd_step_arguments(x, dt, A, B, C, D, state) -> None:
    check_shapes(
        {
            "x": (x, "b h p"),
            "dt": (dt, "b h"),
            "A": (A, "h"),
            "B": (B, "b g n"),
            "C": (C, "b g n"),
            "D": (D, "h"),
            "state": (state, "b h p n"),
        }
    )
    check_dtypes("float", x=x, dt=dt, A=A, B=B, C=C, D=D, state=state)
    check_groups(x.shape[1], B.shape[1])
