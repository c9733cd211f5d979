"""Shape checks of the public operations: names and values, before anything is computed."""

from collections.abc import Mapping

from keras.backend import standardize_dtype


def float32_at_least(dtype) -> str:
    """The dtype of decays and states: float32, or float64 where the inputs are."""
    return "float64" if standardize_dtype(dtype) == "float64" else "float32"


def check_shapes(layouts: Mapping[str, tuple]) -> None:
    """Raises unless every letter stands for one size in `{name: (tensor, "b t h p")}`."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, (tensor, layout) in layouts.items():
        if tensor is None:
            continue
        letters = layout.split()
        shape = tuple(tensor.shape)
        if len(shape) != len(letters):
            raise ValueError(f"`{name}` must have shape ({layout}). Received: shape={shape}")
        for letter, size in zip(letters, shape, strict=True):
            known, owner = sizes.setdefault(letter, (size, name))
            if size is not None and known is not None and size != known:
                raise ValueError(
                    f"`{name}` must have shape ({layout}) with {letter}={known}, as in "
                    f"`{owner}`. Received: {name}.shape={shape}"
                )


def check_groups(h: int, g: int) -> None:
    if h % g:
        raise ValueError(
            f"The number of groups must divide the number of heads. Received: {g} groups "
            f"in `B` and `C`, {h} heads in `x`"
        )


def check_chunk_size(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1. Received: chunk_size={chunk_size}")


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
    check_groups(x.shape[2], B.shape[2])
    check_chunk_size(chunk_size)
    if x.shape[1] == 0:
        raise ValueError(f"`x` must have at least one position. Received: x.shape={x.shape}")


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
    check_groups(x.shape[1], B.shape[1])
